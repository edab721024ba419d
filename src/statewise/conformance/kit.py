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
from statewise.conformance.making import label, require_contract
from statewise.conformance.ranks import RanksError
from statewise.conformance.stage import UndeclaredField
from statewise.conformance.subject import ReferenceFailure, Subject
from statewise.errors import ConfigError, StatewiseError
from statewise.layers.mixer import TokenMixer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICES = ("cpu",)
_KIT, _TORCH = Path(__file__).parent, Path(torch.__file__).parent


def run_check(wanted: Check | str, subject: Subject) -> Finding:
    """Run one check. Never raises because of the layer: what it raises becomes the finding."""
    one = find(wanted) if isinstance(wanted, str) else wanted
    dtype = str(subject.dtype).removeprefix("torch.")
    if subject.scope not in one.scopes:
        return Finding(one.name, dtype, "not applicable", f"a {subject.scope} layer has nothing to check here")
    if one.reference and not subject.has_reference:
        return Finding(one.name, dtype, "not checked", "no reference(): add the layer's token-by-token specification")
    hint = one.hint
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
        own = isinstance(error, ReferenceFailure | UndeclaredField | RanksError | StatewiseError)
        kind = "" if own else f"{type(error).__name__}: "
        evidence.raised = f"{kind}{' '.join(str(error).split())}{_place(error)}"
        if isinstance(error, ReferenceFailure | UndeclaredField) and not evidence.problems:
            hint = ""  # that of the check would lead elsewhere
    return evidence.finding(one.name, dtype, one.proves, hint, time.perf_counter() - began)


def run_checks(
    layer: type[TokenMixer],
    dtypes: Iterable[str] | None = None,
    *,
    device: str = "cpu",
    only: Iterable[str] = (),
    long: int = 65_536,
    seed: int = 0,
) -> Iterator[Finding]:
    """Findings one by one, in every dtype that the layer lists, or in exactly `dtypes`.

    Raises `PluginError` when the layer cannot be built at all, `ConfigError` for an option, and for a dtype or a device
    that the layer does not list.
    """
    check_options(device, only)
    chosen = [find(name) for name in only] or CHECKS
    require_contract(layer)
    able = [name for name, dtype in DTYPES.items() if dtype in layer.capabilities.dtypes]
    if not able:
        listed = ", ".join(str(dtype).removeprefix("torch.") for dtype in layer.capabilities.dtypes)
        raise ConfigError(f"{label(layer)} runs in {listed} only; the conformance kit knows {', '.join(DTYPES)}")
    for name in DTYPES if dtypes is None else dtypes:
        if name not in DTYPES:
            raise ConfigError(f"dtype {name!r} is not supported; choose float32 or bfloat16")
        if dtypes is None and name not in able:
            for one in chosen:
                yield Finding(one.name, name, "not applicable", f"the layer's capabilities do not list {name}")
            continue
        subject = Subject(layer, DTYPES[name], device=device, seed=seed, long=long)
        for one in chosen:
            yield run_check(one, subject)


def prove(layer: type[TokenMixer], dtypes: Iterable[str] | None = None, **options: object) -> Report:
    """All findings about a layer; the options are those of `run_checks`."""
    name = label(layer) if isinstance(layer, type) else repr(layer)
    return Report(name, tuple(run_checks(layer, dtypes, **options)))  # type: ignore[arg-type]


def check_options(device: str, only: Iterable[str]) -> None:
    """Raise `ConfigError` for a device that the kit does not run on, or a check that it does not have."""
    if device not in DEVICES:
        raise ConfigError(f"the conformance kit runs on {', '.join(DEVICES)} only, not on {device!r}")
    for name in only:
        find(name)


def find(name: str) -> Check:
    """The check of that name. Raises `ConfigError` that lists the names."""
    for one in CHECKS:
        if one.name == name:
            return one
    raise ConfigError(f"no check is called {name!r}; there are: {', '.join(one.name for one in CHECKS)}")


def _place(error: Exception) -> str:
    """The last line of the layer's own code that the error came through, or of ours that serves it."""
    wrapped = error.__cause__ if isinstance(error, ReferenceFailure | StatewiseError) else None
    passed = traceback.extract_tb((wrapped or error).__traceback__)
    outside = [frame for frame in passed if not _lies_in(frame, _KIT, _TORCH)]
    frames = [frame for frame in outside if not _lies_in(frame, _KIT.parent)] or outside
    return f" ({'/'.join(Path(frames[-1].filename).parts[-2:])}, line {frames[-1].lineno})" if frames else ""


def _lies_in(frame: traceback.FrameSummary, *directories: Path) -> bool:
    return not set(directories).isdisjoint(Path(frame.filename).parents)
