"""Who shares which layers, for people: one table, and one line for each site."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from federation import files

if TYPE_CHECKING:
    from orchestrator.aggregation.shared_layers import SharedLayers

BLOCK = 3  # parts of a name that make a row: encoder.stages.0


def read_layers(study_folder: Path) -> SharedLayers:
    """The shared layers of a study at the orchestrator."""
    from orchestrator.aggregation.shared_layers import SharedLayers

    return SharedLayers.from_json(files.read_json(study_folder / "layers.json"))


def summary(shared: dict[str, list[int]], common: int) -> str:
    """One line: how much each site shares, and how much all share.

    Parameters
    ----------
    shared : dict
        For each site the parameters that it shares, and those of its whole network.
    common : int
        The parameters that every site shares.
    """
    sites = ", ".join(f"{site} {share(part, whole)}" for site, (part, whole) in sorted(shared.items()))
    return f"share of its parameters that a site averages with others: {sites}; common to all: {common:,}"


def share(part: int, whole: int) -> str:
    """A share in percent, never rounded to all or nothing."""
    if part in (0, whole):
        return "0 %" if part == 0 else "100 %"
    return f"{min(max(100 * part / whole, 0.1), 99.9):.1f} %"


def layers_table(layers: SharedLayers) -> Table:
    """The rows are the blocks of the network; a block whose tensors differ in who shares them has several rows."""
    sites = sorted(layers.names)
    rows: dict[tuple[str, Sequence[str]], list[str]] = {}
    for key in sorted(layers.specs, key=_place):
        block = ".".join(key.partition("@")[0].split(".")[:BLOCK])
        rows.setdefault((block, layers.holders(key)), []).append(key)
    table = Table(title="layers that are averaged, and among whom")
    table.add_column("layers", overflow="fold", min_width=21)
    for name in ("tensors", "parameters"):
        table.add_column(name, justify="right")
    for site in sites:
        table.add_column(site, justify="center", overflow="fold")
    for (block, holders), keys in rows.items():
        marks = ("x" if site in holders else "" for site in sites)
        table.add_row(block, str(len(keys)), f"{layers.parameters(keys):,}", *marks)
    table.add_section()
    table.add_row(
        "shared, of the whole network",
        str(len(layers.specs)),
        f"{layers.parameters(layers.specs):,}",
        *(share(layers.shared(site), layers.totals[site]) for site in sites),
    )
    table.add_row(
        "common to all", "", f"{layers.common:,}", *(share(layers.common, layers.totals[site]) for site in sites)
    )
    return table


def _place(key: str) -> tuple[Any, ...]:
    """Order of the layers: encoder first, numbers as numbers."""
    parts = key.partition("@")[0].split(".")
    return (parts[0] != "encoder", [(part.isdigit(), int(part) if part.isdigit() else part) for part in parts], key)


def networks_table(study_folder: Path, sites: Sequence[str]) -> Table:
    """Each site's own plan, as far as the site tells it (AsymFedAvg)."""
    from federation.tasks import parse_result

    table = Table(title="each site's own plan")
    for name in ("site", "patch", "spacing, mm", "batch", "stages", "features"):
        table.add_column(name)
    for site in sites:
        answer = parse_result((study_folder / "answers" / "prepare" / f"{site}.json").read_bytes()).preparation
        if answer is None or answer.network is None:
            continue
        arguments = answer.network.architecture["arch_kwargs"]
        table.add_row(
            site,
            " x ".join(map(str, answer.network.patch_size)),
            " x ".join(f"{value:.4g}" for value in answer.network.spacing),
            str(answer.network.batch_size),
            str(arguments["n_stages"]),
            "/".join(map(str, arguments["features_per_stage"])),
        )
    return table
