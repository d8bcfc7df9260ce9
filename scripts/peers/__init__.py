"""Who decodes beside a bundle: one module for each kind of peer, one line here for each peer.

A new peer is a class after `peers.peer.Peer`, and its line in `PEERS`. Modules load PyTorch or a
runtime, and so only in the process that needs them.
"""

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cla_export.bundle import Bundle
    from peers.peer import Peer

PEERS: Mapping[str, tuple[str, Mapping[str, bool]]] = {  # its class, and options of that
    "bundle": ("peers.executor:ExecutorPeer", {}),
    "stock": ("peers.executor:ExecutorPeer", {"stock": True}),
    "torch eager": ("peers.pytorch:TorchPeer", {}),
    "torch compile": ("peers.pytorch:TorchPeer", {"compiled": True}),
    "torch frozen": ("peers.pytorch:TorchPeer", {"compiled": True, "frozen": True}),
    "per-layer Concat": ("peers.concat:ConcatPeer", {"per_layer": True}),
    "per-group Concat": ("peers.concat:ConcatPeer", {"per_layer": False}),
    "genai": ("peers.genai:GenaiPeer", {}),
}
PREFILL_PEERS = ("bundle", "stock", "torch eager", "genai")
EXTRA_PEERS = ("torch frozen",)  # run only if named


def prepare_peer(name: str, bundle: "Bundle") -> None:
    """Write what a peer needs beside the bundle, which is in a folder for this run."""
    where, options = PEERS[name]
    resolve_name(where).prepare(bundle, **options)


def open_peer(name: str, bundle: "Bundle", threads: int) -> "Peer":
    """Load a peer's model."""
    where, options = PEERS[name]
    peer: Peer = resolve_name(where)(bundle, threads, **options)
    return peer
