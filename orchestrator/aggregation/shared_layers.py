"""Which layers of the sites' networks are averaged with which (AsymFedAvg, arXiv 2503.02549; FFE is the plain case).

Rules:

- The orchestrator keeps one file of all that is shared, the store. A tensor of the store has a key: with one network
  for all sites the tensor's name, with `asymfedavg` its name and shape (`NAME@32x1x3x3x3`), so that the same name may
  stand for several groups of sites.
- `layers: groups`: a tensor is shared among the sites, two or more, that have it in the same shape. `layers: common`:
  only what every site has. What is shared with nobody, and what `keep_local` names, never leaves its site.
- 2d and 3d networks have no layer in common that means the same: they are refused (FNU-308), and so is a site that
  would share nothing (FNU-309).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from federation.errors import Code, FednnunetError
from federation.layers import kept_local
from federation.study import Study
from federation.tasks import Network
from federation.weights import Spec


@dataclass(frozen=True)
class SharedLayers:
    """Who shares what.

    Attributes
    ----------
    specs : Mapping[str, Spec]
        Element type and shape of each tensor of the store, by key.
    names : Mapping[str, Mapping[str, str]]
        For each site the keys that it shares and the name of the tensor in its network.
    totals : Mapping[str, int]
        Parameters in each site's whole network.
    """

    specs: Mapping[str, Spec]
    names: Mapping[str, Mapping[str, str]]
    totals: Mapping[str, int]

    def holders(self, key: str) -> tuple[str, ...]:
        """The sites that share a tensor, by name."""
        return tuple(sorted(site for site, names in self.names.items() if key in names))

    def parameters(self, keys: Iterable[str]) -> int:
        """How many numbers some tensors of the store hold together."""
        return sum(math.prod(self.specs[key].shape) for key in keys)

    def shared(self, site: str) -> int:
        """How many parameters a site shares with any other."""
        return self.parameters(self.names[site])

    @property
    def common(self) -> int:
        """How many parameters all sites share."""
        return self.parameters(key for key in self.specs if len(self.holders(key)) == len(self.names))

    def to_json(self) -> dict[str, Any]:
        """Plain data for `layers.json`."""
        return {
            "specs": {key: [spec.dtype.str, list(spec.shape)] for key, spec in sorted(self.specs.items())},
            "names": {site: dict(sorted(names.items())) for site, names in sorted(self.names.items())},
            "totals": dict(sorted(self.totals.items())),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SharedLayers:
        """From `layers.json`."""
        specs = {key: Spec(np.dtype(dtype), tuple(shape)) for key, (dtype, shape) in value["specs"].items()}
        return cls(specs, value["names"], value["totals"])


def share(networks: Mapping[str, Mapping[str, Spec]], study: Study) -> SharedLayers:
    """Decide what is shared.

    Parameters
    ----------
    networks : Mapping[str, Mapping[str, Spec]]
        For each site the tensors of its network.
    study : Study
        Its `mode`, `layers` and `keep_local`.

    Raises
    ------
    FednnunetError
        FNU-309 names the sites that would share nothing.
    """
    totals = {site: sum(math.prod(spec.shape) for spec in specs.values()) for site, specs in networks.items()}
    offered: dict[str, dict[str, tuple[str, Spec]]] = {}
    for site, specs in networks.items():
        local = kept_local(specs, study.keep_local)
        for name, spec in specs.items():
            if name not in local:
                offered.setdefault(_key(name, spec, study), {})[site] = (name, spec)
    least = 1 if study.mode == "ffe" else 2 if study.layers == "groups" else len(networks)
    kept = {key: holders for key, holders in offered.items() if len(holders) >= least}
    names = {site: {key: kept[key][site][0] for key in kept if site in kept[key]} for site in networks}
    alone = sorted(site for site, shared in names.items() if not shared)
    if alone:
        raise FednnunetError(Code.NOTHING_SHARED, f"{', '.join(alone)} (layers: {study.layers})")
    specs = {key: next(iter(holders.values()))[1] for key, holders in kept.items()}
    return SharedLayers(specs, names, totals)


def _key(name: str, spec: Spec, study: Study) -> str:
    return name if study.mode == "ffe" else f"{name}@{'x'.join(map(str, spec.shape))}"


def check_networks(networks: Mapping[str, Network]) -> None:
    """Refuse networks that differ in kind; raises FNU-308 that names who has which.

    Parameters
    ----------
    networks : Mapping[str, Network]
        What each site told of its plan.
    """
    for what, kind_of in (("dimensions", _dimensions), ("class", _class)):
        kinds: dict[str, list[str]] = {}
        for site, network in sorted(networks.items()):
            kinds.setdefault(kind_of(network), []).append(site)
        if len(kinds) > 1:
            found = "; ".join(f"{kind}: {', '.join(sites)}" for kind, sites in sorted(kinds.items()))
            raise FednnunetError(Code.NETWORKS_DIFFER, f"{what} of the networks differ: {found}")


def _dimensions(network: Network) -> str:
    return f"{len(network.patch_size)}d"


def _class(network: Network) -> str:
    return str(network.architecture.get("network_class_name")).rpartition(".")[2]
