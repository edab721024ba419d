"""One or all of the checks, run on a layer."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from statewise.conformance.check import Check
from statewise.conformance.checks import CHECKS
from statewise.conformance.findings import Evidence, Finding, NotApplicableError, NotCheckedError, Report
from statewise.conformance.ranks import RanksError
from statewise.conformance.subject import ReferenceFailure, Subject
from statewise.errors import ConfigError
from statewise.layers.mixer import TokenMixer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICES = ("cpu",)


def run_check(wanted: Check | str, subject: Subject) -> Finding:
    """Run one check. Never raises because of the layer: what it raises becomes the finding."""
    one = find(wanted) if isinstance(wanted, str) else wanted
    dtype = str(subject.dtype).removeprefix("torch.")
    if subject.scope not in one.scopes:
        return Finding(one.name, dtype, "not applicable", f"a {subject.scope} layer has nothing to check here")
    if one.reference and not subject.has_reference:
        return Finding(one.name, dtype, "not checked", "no reference(): add the layer's token-by-token specification")
    began, evidence = time.perf_counter(), Evidence()
    torch.set_flush_denormal(True)  # as the engine runs layers; a decayed state full of denormals is slow
    try:
        with torch.inference_mode():
            one.run(subject, evidence)
    except NotApplicableError as reason:
        return Finding(one.name, dtype, "not applicable", str(reason))
    except NotCheckedError as reason:
        return Finding(one.name, dtype, "not checked", str(reason))
    except Exception as error:
        own = isinstance(error, ReferenceFailure | RanksError)
        kind = "" if own else f"{type(error).__name__}: "
        evidence.raised = f"{kind}{' '.join(str(error).split())}{_place(error)}"
    return evidence.finding(one.name, dtype, one.proves, one.hint, time.perf_counter() - began)


def run_checks(
    layer: type[TokenMixer],
    dtypes: Iterable[str] = ("float32", "bfloat16"),
    *,
    device: str = "cpu",
    only: Iterable[str] = (),
    long: int = 65_536,
    seed: int = 0,
) -> Iterator[Finding]:
    """Findings one by one. Raises `PluginError` when the layer cannot be built at all, `ConfigError` for an option."""
    if device not in DEVICES:
        raise ConfigError(f"the conformance kit runs on {', '.join(DEVICES)} only, not on {device!r}")
    chosen = [find(name) for name in only] or CHECKS
    for name in dtypes:
        if name not in DTYPES:
            raise ConfigError(f"dtype {name!r} is not supported; choose float32 or bfloat16")
        able = getattr(layer, "capabilities", None)
        if able is not None and DTYPES[name] not in able.dtypes:
            for one in chosen:
                yield Finding(one.name, name, "not applicable", f"the layer's capabilities do not list {name}")
            continue
        subject = Subject(layer, DTYPES[name], device=device, seed=seed, long=long)
        for one in chosen:
            yield run_check(one, subject)


def prove(layer: type[TokenMixer], dtypes: Iterable[str] = ("float32", "bfloat16"), **options: object) -> Report:
    """All findings about a layer; the options are those of `run_checks`."""
    name = f"{layer.__module__}:{layer.__qualname__}" if isinstance(layer, type) else repr(layer)
    return Report(name, tuple(run_checks(layer, dtypes, **options)))  # type: ignore[arg-type]


def find(name: str) -> Check:
    """The check of that name. Raises `ConfigError` that lists the names."""
    for one in CHECKS:
        if one.name == name:
            return one
    raise ConfigError(f"no check is called {name!r}; there are: {', '.join(one.name for one in CHECKS)}")


def _place(error: Exception) -> str:
    """The last line of other people's code that the error came through."""
    home = Path(__file__).parent
    frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
    outside = [frame for frame in frames if home not in Path(frame.filename).parents]
    if not outside:
        return ""
    frame = outside[-1]
    return f" ({'/'.join(Path(frame.filename).parts[-2:])}, line {frame.lineno})"
