"""Where optimum's command line looks for further commands. No __init__.py here or above: the folders are shared."""

from optimum.commands.export.base import ExportCommand

from sfexport.optimum_command import SfexportExportCommand

REGISTER_COMMANDS = [(SfexportExportCommand, ExportCommand)]
