"""TensorRT's real Python bindings on a machine without GPU and without TensorRT's libraries.

    stubs.py          shared objects that let them be imported, and the layout that makes them `tensorrt`
    venvs.py          throw-away environments with the bindings of each version, from the package index
    surface.py        what each version offers (surface_*.json), written by dump_surface.py from the real bindings
    usage.py          what a source file uses of TensorRT, read from its syntax tree
    expressions.py    dimension expressions, and the calls that a builder and a runtime make on a plugin
    dump_surface, probe, toy_plugin, toy_quick, drive_plugins: programs that run inside an environment

The folder is not called tensorrt_bindings: that is the name of the real package, which it must not hide.
"""
