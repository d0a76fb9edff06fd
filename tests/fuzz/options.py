"""Kinds of hostile option values, at the command line and at Python's doors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import sfexport
from fuzz.base import BUNDLE, CHECKPOINT, CLIP, ENGINES, FRAMES, QUESTION, read, whole
from fuzz.kinds import Case, Expect, Kind, Wrong, call, command
from sfexport.artifacts.bundle import Bundle
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.engines.build import build
from sfexport.exporting.export import ExportOptions, export

REFUSED, ANSWERED, EITHER = Expect.REFUSED, Expect.ANSWERED, Expect.EITHER

TEXTS = ("abc", "", " ", "1.5.2", "0x", "\x1b[2J", "nul\u202e", "None", "true", "\uff11\u00b2")
NOT_WHOLE = (*TEXTS, "nan", "inf", "1.5", "1e3", "1e400")
COUNT = (*NOT_WHOLE, "-1", "0", str(-(10**30)))
INDEX = (*NOT_WHOLE, "-1", str(-(10**30)))
POSITIVE = (*TEXTS, "nan", "inf", "-inf", "-1", "0", "1e400", "-1e-320")
CHOICE = (*TEXTS, "FP32", "fp32 ", "a" * 10_000)
BIG = ("65536", "1000000", str(10**9), str(2**31), str(2**63), str(10**30))

# Command -> option -> (values to be refused, values that may be refused).
OPTIONS: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "export": {
        "--frames": (COUNT, (*BIG, "1", "64")),
        "--weights": (CHOICE, ()),
        "--precision": (CHOICE, ("fp16", "bf16")),
        "--quantize": ((*CHOICE, "int8", "INT4"), ()),
        "--lm-head": ((*CHOICE, "int8"), ()),
        "--split-lm-head": ((*COUNT, *BIG), ("1", "3", "64")),
    },
    "build": {
        "--backend": ((*CHOICE, "TensorRT"), ()),
        "--target": (CHOICE, ()),
        "--jetpack": ((*CHOICE, "6.2"), ()),
        "--precision": (CHOICE, ()),
        "--optimization-level": ((*NOT_WHOLE, "-1", "6", str(10**30)), ()),
        "--frames": ((*COUNT, str(10**30)), ()),
        "--max-question-tokens": ((*COUNT, str(10**30)), ()),
        "--max-new-tokens": ((*COUNT, str(10**30)), ()),
        "--kernels": ((), ("nowhere", "/dev/null")),
    },
    "ask": {
        "--frames": ((*COUNT, *BIG[1:]), ("1", "2", "65536")),
        "--sampling": (CHOICE, ("eval",)),
        "--max-new-tokens": (COUNT, ("1", "64")),
        "--temperature": ((*TEXTS, "nan", "inf", "-1", "1e400"), ("0", "1e-320", "1e-300", "1e300", "0.7")),
        "--top-k": (INDEX, ("1", "5", *BIG)),
        "--top-p": ((*TEXTS, "nan", "inf", "-1", "0", "1.5", "1e400"), ("1", "1e-320", "0.5")),
        "--repetition-penalty": (POSITIVE, ("1e-320", "1e300", "1.3")),
        "--seed": (INDEX, ("0", *BIG)),
        "--stop": (("", "not one token at all", "\udcff"), ("a", "<|im_end|>", "\x1b")),
        "--mode": (CHOICE, ("trained", "released")),
    },
    "plan": {
        "--target": (CHOICE, ("cpu", "all")),
        "--jetpack": (CHOICE, ()),
        "--frames": ((*COUNT, str(10**30)), ("1", "96", "65536", str(10**9))),
    },
    "doctor": {"--target": (CHOICE, ())},
    "parity": {
        "--frames": (COUNT, ()),
        "--max-new-tokens": (COUNT, ()),
        "--atol": ((*TEXTS, "nan", "-1"), ()),
        "--rtol": ((*TEXTS, "nan", "-1"), ()),
    },
}
FIXED: dict[str, Callable[[Case], tuple[Any, ...]]] = {
    "export": lambda case: (case.base / CHECKPOINT, "-o", case.room / BUNDLE),
    "build": lambda case: (case.base / BUNDLE, "-o", case.room / ENGINES),
    "ask": lambda case: (case.base / ENGINES, case.base / CLIP, "-q", QUESTION, "--json"),
    "plan": lambda case: (case.base / CHECKPOINT,),
    "doctor": lambda case: (),
    "parity": lambda case: (case.base / ENGINES,),
}


def _command_kinds() -> Iterator[Kind]:
    for verb, options in OPTIONS.items():
        for option, (refused, either) in options.items():
            for expect, values, what in ((REFUSED, refused, "of no use"), (EITHER, either, "at its limits")):
                if values:
                    act = partial(_by_command, verb=verb, option=option, values=values)
                    name = f"{verb} {option}, a value {what}"
                    torch = verb == "parity"
                    yield Kind(name, "options", act, expect, cases=len(values), needs_torch=torch, timeout=60)


def _by_command(case: Case, verb: str, option: str, values: tuple[str, ...]) -> None:
    value = values[case.number]
    if verb in ("ask",) and option in ("--top-k", "--top-p") and "--temperature" not in values:
        more: tuple[Any, ...] = ("--temperature", "0.5", "--seed", 1)
    elif verb == "ask" and option != "--max-new-tokens":
        more = ("--max-new-tokens", 2)
    else:
        more = ()
    fixed = FIXED[verb](case)
    if verb == "plan" and option == "--jetpack":
        fixed = (*fixed, "--target", "jetson-orin-agx-64")
    printed = command(verb, *fixed, *more, f"{option}={value}")
    if verb == "export":
        bundle = call(Bundle.open, case.room / BUNDLE)
        if option == "--frames" and bundle.frames != int(value):
            raise Wrong(f"{bundle.frames} frames, not {value}")
        if option == "--precision" and bundle.precision != value:
            raise Wrong(f"{bundle.precision}, not {value}")
        _check_answers(case)
    if verb == "ask":
        found = json.loads(printed)
        if option == "--frames" and found["frames"] != int(value):
            raise Wrong(f"{found['frames']} frames, not {value}")


def _check_answers(case: Case) -> None:
    """What was exported with an odd option still builds (in fp32) and gives a prompt like the undamaged one."""
    if call(Bundle.open, case.room / BUNDLE).precision == "bf16":
        return
    command("build", case.room / BUNDLE, "-o", case.room / ENGINES, "--backend", "onnxruntime")
    found = read(case.room / ENGINES)
    if found.prompt != whole(case.base).prompt or abs(found.logits - whole(case.base).logits).max() > 0.2:
        raise Wrong("another prompt, or logits far from the undamaged ones")


class _Odd:
    """Nobody's type."""

    def __repr__(self) -> str:
        return "\x1b[31modd\x1b[0m"


VALUES: dict[str, Any] = {
    "text": "abc",
    "number as text": "4",
    "empty text": "",
    "negative": -1,
    "zero": 0,
    "fraction": 2.5,
    "whole fraction": 4.0,
    "huge": 10**9,
    "beyond 64 bits": 10**30,
    "beyond floats": 10**400,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "tiny": 1e-320,
    "True": True,
    "list": [4],
    "tuple": (1, 2),
    "object": {},
    "bytes": b"4",
    "a strange object": _Odd(),
    "complex": 1j,
}
_NO_NUMBER = {
    "text",
    "number as text",
    "empty text",
    "NaN",
    "list",
    "tuple",
    "object",
    "bytes",
    "a strange object",
    "complex",
}
_COUNT = _NO_NUMBER | {"negative", "zero", "fraction", "infinite", "tiny"}
PYTHON = {
    "encode frames": (_COUNT | {"huge", "beyond 64 bits", "beyond floats"}),
    "encode fps": _NO_NUMBER | {"negative", "zero", "infinite"},
    "encode sampling": set(VALUES),
    "encode questions": set(VALUES) - {"object", "empty text", "zero"},
    "ask max_new_tokens": _COUNT,
    "ask temperature": _NO_NUMBER | {"negative", "infinite", "beyond floats"},
    "ask top_p": _NO_NUMBER
    | {"negative", "zero", "fraction", "whole fraction", "huge", "beyond 64 bits", "beyond floats", "infinite"},
    "ask top_k": (_COUNT - {"zero"}),
    "ask repetition_penalty": _NO_NUMBER | {"negative", "zero", "infinite", "beyond floats"},
    "ask seed": (_COUNT - {"zero"}),
    "ask mode": set(VALUES) - {"empty text", "zero", "object"},
    "load engines": set(VALUES),
    "export frames": _COUNT,
    "export weights": set(VALUES),
    "export precision": set(VALUES),
    "export quantize": set(VALUES),
    "export lm_head": set(VALUES),
    "export split_lm_head": _COUNT | {"huge", "beyond 64 bits", "beyond floats"},
    "build backend": set(VALUES),
}


def _python_kinds() -> Iterator[Kind]:
    for name, never in PYTHON.items():
        for what, value in VALUES.items():
            if (name, what) == ("ask max_new_tokens", "huge"):  # a random model may well use all of them
                continue
            act = partial(_by_python, door=name, value=value)
            yield Kind(f"Python, {name}: {what}", "options", act, REFUSED if what in never else EITHER, timeout=60)


def _by_python(case: Case, door: str, value: Any) -> None:
    verb, name = door.split()
    if verb == "load":
        call(sfexport.load, value)
    elif verb == "export":
        options = call(ExportOptions, **{name: value})
        call(export, call(Checkpoint.open, case.base / CHECKPOINT), case.room / BUNDLE, options)
        _check_answers(case)
    elif verb == "build":
        call(build, call(Bundle.open, case.base / BUNDLE), case.room / ENGINES, value)
    else:
        pipeline = call(sfexport.load, case.base / ENGINES)
        more = {"sampling": "eval"} if name == "fps" else {}
        session = call(pipeline.encode, FRAMES, **({name: value} | more if verb == "encode" else {}))
        keywords = {"max_new_tokens": 2} | ({name: value} if verb == "ask" else {})
        keywords |= {"temperature": 0.7} if name in ("top_p", "top_k") else {}
        found = call(session.ask, QUESTION, **keywords)
        if not 1 <= len(found.ids) <= max(64, int(keywords["max_new_tokens"])):
            raise Wrong(f"{len(found.ids)} tokens")


# Each leaves one token to sample among, at a temperature that makes all tokens as likely.
ONE_TOKEN: dict[str, float] = {"top_k": 1, "top_p": 1e-9}
HOT = 50.0


def _sampling_kinds() -> Iterator[Kind]:
    for name, value in ONE_TOKEN.items():
        for door, act in (("Python", _sampled_by_python), ("command line", _sampled_by_command)):
            text = f"{door}, sampled among one token by {name}"
            yield Kind(text, "options", partial(act, name=name, value=value), ANSWERED)


def _sampled_by_python(case: Case, name: str, value: float) -> None:
    found = read(case.base / ENGINES, temperature=HOT, **{name: value})
    if found.ids != whole(case.base).ids:
        raise Wrong(f"{found.ids}, not the greedy {whole(case.base).ids}")


def _sampled_by_command(case: Case, name: str, value: float) -> None:
    options = ("--temperature", HOT, f"--{name.replace('_', '-')}", value)
    found, greedy = (_asked(case, "--max-new-tokens", 8, *more) for more in (options, ()))
    if found != greedy:
        raise Wrong(f"{found}, not the greedy {greedy}")


def _asked(case: Case, *options: object) -> list[int]:
    """The answer's token ids."""
    return json.loads(command("ask", *FIXED["ask"](case), *options))["questions"][0]["ids"]


def _path_kinds() -> Iterator[Kind]:
    for name, value in {"None": None, "a number": 5, "bytes": b"engines", "a list": [], "a NUL": "a\0b"}.items():
        for door, function in (("load", sfexport.load), ("Checkpoint.open", Checkpoint.open)):
            act = partial(_open, function=function, value=value)
            yield Kind(f"Python, {door} on {name}", "options", act, REFUSED)


def _open(case: Case, function: Callable[[Any], Any], value: Any) -> None:
    call(function, value)


KINDS = [*_command_kinds(), *_python_kinds(), *_sampling_kinds(), *_path_kinds()]
