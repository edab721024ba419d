"""`statewise snapshot`: sessions in files; what a file holds, whether it is sound, and how two differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from statewise.cli.display import bytes_text, console, print_json, ranges_text
from statewise.cli.options import dtype_option, overrides_option
from statewise.cli.snapshot_session import save, take_up
from statewise.errors import SnapshotError

if TYPE_CHECKING:
    from statewise.memory.snapshot_diff import Difference
    from statewise.memory.snapshot_format import Header

_file = click.Path(exists=True, dir_okay=False, path_type=Path)
_json = click.option("--json", "as_json", is_flag=True, help="Print as JSON.")


@click.group(short_help="Save, load and look at files of saved state.")
def snapshot() -> None:
    """Save, load and look at snapshots: a session and its state in a file, bound to the model that made it."""


snapshot.add_command(save)
snapshot.add_command(take_up)


@snapshot.command("inspect")
@click.argument("file", type=_file)
@_json
def inspect_file(file: Path, as_json: bool) -> None:
    """Show what a file holds.

    Reads the header only; `verify` checks the rest. The exit status is 2 for a file that is refused.
    """
    from statewise.memory.snapshot import read_header

    header = read_header(file)
    if as_json:
        print_json(_summary(file, header))
    else:
        _show(file, header)


@snapshot.command()
@click.argument("file", type=_file)
@click.option("--model", help="Also check that the state is of this model and fits its layers.")
@dtype_option
@overrides_option
@_json
@click.pass_context
def verify(
    ctx: click.Context,
    file: Path,
    model: str | None,
    dtype: str | None,
    overrides: tuple[tuple[str, Any], ...],
    as_json: bool,
) -> None:
    """Check every byte of a file against its digests.

    With --model also whether the file can be taken up there; --dtype and --set say how that model is served. The exit
    status is 0 for a sound file, 1 for one that is refused, 2 if the model cannot be read.
    """
    from statewise.memory.snapshot import verify_snapshot

    if model is None and (dtype is not None or overrides):
        raise click.UsageError("--dtype and --set say how a model is served: name it with --model")
    expected = _expected(model, dtype, dict(overrides)) if model is not None else ()
    try:
        header = verify_snapshot(file, *expected)
    except SnapshotError as error:
        if as_json:
            print_json({"sound": False, "reason": str(error)})
        else:
            click.echo(f"refused: {error}")
        ctx.exit(1)
    if as_json:
        print_json({"sound": True, "model": model, **_summary(file, header)})
        return
    fits = "" if model is None else f"; it fits {model}"
    click.echo(f"sound: {len(header.entries)} tensors, {header.num_tokens:,} tokens{fits}")


@snapshot.command()
@click.argument("first", type=_file)
@click.argument("second", type=_file)
@_json
@click.pass_context
def diff(ctx: click.Context, first: Path, second: Path, as_json: bool) -> None:
    """Compare two files: model, tokens, tensors by their bits, and what they say of the session.

    Entries of pages are compared for the tokens that both begin with. The exit status is 0 if all is the same, 1 if
    not, 2 for a file that is refused.
    """
    from statewise.memory.snapshot import read_snapshot
    from statewise.memory.snapshot_diff import compare

    found = compare(read_snapshot(first), read_snapshot(second))
    if as_json:
        print_json({"same": found.same, **vars(found)})
    else:
        _show_difference(found)
    ctx.exit(0 if found.same else 1)


def _expected(model: str, dtype: str | None, overrides: dict[str, Any]) -> tuple[Any, ...]:
    """Identity, specs and longest sequence of a model as it would be served."""
    from statewise.config import EngineConfig
    from statewise.engine.runner import block_specs
    from statewise.models.directory import model_directory
    from statewise.models.identity import model_identity
    from statewise.models.registry import build, read_model_config, resolve_dtype

    directory = model_directory(model)
    model_class, config, values = read_model_config(directory, overrides)
    engine_config = EngineConfig(dtype=resolve_dtype(dtype or "auto", values))
    specs = block_specs(build(model_class, config, engine_config).mixers, engine_config)
    return model_identity(directory, overrides), *specs, config.max_length


def _summary(file: Path, header: Header) -> dict[str, Any]:
    from statewise.memory.snapshot_header import VERSION

    return {
        "file": file.name,
        "bytes": file.stat().st_size,
        "version": VERSION,
        "name": header.name,
        "created": header.created,
        "tokens": header.num_tokens,
        "tokens_digest": header.entries["tokens"].digest,
        "identity": vars(header.identity),
        "record_bytes": _bytes_of(header, "record."),
        "page_bytes": _bytes_of(header, "pages."),
        "tensors": {
            name: {"dtype": entry.dtype, "shape": list(entry.shape), "digest": entry.digest}
            for name, entry in header.entries.items()
        },
    }


def _bytes_of(header: Header, prefix: str) -> int:
    return sum(entry.nbytes for name, entry in header.entries.items() if name.startswith(prefix))


def _show(file: Path, header: Header) -> None:
    from rich.table import Table

    for label, text in (("name", header.name), ("created", header.created)):
        if text:
            click.echo(f"{label:<10} {text}")
    click.echo(f"tokens     {header.num_tokens:,}")
    record, pages = (bytes_text(_bytes_of(header, prefix)) for prefix in ("record.", "pages."))
    click.echo(f"file       {bytes_text(file.stat().st_size)}: record {record}, pages {pages}")
    for part, digest in vars(header.identity).items():
        click.echo(f"{part:<10} {digest or 'none'}")
    click.echo()
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in ("layers", "field", "shape"):
        table.add_column(column)
    groups: dict[tuple[str, str], list[int]] = {}
    for name, field in header.layout.items():
        scope, layer, field_name = name.split(".")
        each = "" if scope == "record" else ", for each token"
        groups.setdefault((field_name, f"{field}{each}"), []).append(int(layer))
    for (field_name, shape), layers in sorted(groups.items(), key=lambda group: group[1]):
        table.add_row(ranges_text(layers), field_name, shape)
    console().print(table)


def _show_difference(found: Difference) -> None:
    from rich.table import Table

    differing = " and ".join(found.identity)
    click.echo(f"model      {f'not the same: {differing}' if differing else 'the same'}")
    first, second = found.tokens
    click.echo(f"tokens     {first:,} and {second:,}, the first {found.common_tokens:,} the same")
    if found.transcript:
        click.echo(f"transcript not the same: {' and '.join(found.transcript)}")
    click.echo(f"tensors    {len(found.tensors)} of {found.compared} differ")
    if not found.tensors:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in ("tensor", "different", "of", "largest"):
        table.add_column(column, justify="left" if column == "tensor" else "right")
    for tensor in found.tensors:
        if tensor.reason:
            table.add_row(tensor.name, tensor.reason)
        else:
            table.add_row(tensor.name, f"{tensor.different:,}", f"{tensor.elements:,}", f"{tensor.largest:.1e}")
    click.echo()
    console().print(table)
