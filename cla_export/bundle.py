"""The bundle: a flat folder that holds everything needed to run an exported model.

    model.onnx  model.onnx.data       the graph and its weights
    *.safetensors                     the checkpoint's own files, linked, where weights are as there
    model.cpu.onnx                    a graph for CPUs over the same weights (onnxruntime, float32)
    model.cuda.onnx                   one for NVIDIA GPUs (onnxruntime, float16 and bfloat16)
    model.cuda.plugin.onnx            the same with our own operators
    config.json, generation_config.json, tokenizer files, chat_template.jinja: the model's own
    genai_config.json                 what onnxruntime-genai reads (onnxruntime target)
    bundle.json                       ours: KV layout, groups, limits, tool versions, sha256 of all

It is written to a temporary folder beside its destination and renamed when complete, so a bundle is
never half there. It is verified before use.
"""

import contextlib
import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import cast

from cla_export.errors import BundleError, LayoutError
from cla_export.layout import KVLayout
from cla_export.quantization import Quantization

SCHEMA = 1
MANIFEST = "bundle.json"
BUILD_RECORD = "build.json"  # of an engine's folder
_KINDS = {
    MANIFEST: "a bundle",
    BUILD_RECORD: "an engine",
    "config.pbtxt": "a Triton model",
    "kubernetes.yaml": "a cluster's manifests",
}
GRAPH = "model.onnx"
CPU_GRAPH = "model.cpu.onnx"
CUDA_GRAPH = "model.cuda.onnx"
CUDA_PLUGIN_GRAPH = "model.cuda.plugin.onnx"
WEIGHTS = "model.onnx.data"
COPIED = (  # from the model folder, where it has them
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "heldout.txt",
)
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, None)  # None: NumPy's, when a write falls short
Progress = Callable[[str, int, int], None]  # what is done, bytes or steps done, of how many


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle. `manifest` is bundle.json as written."""

    folder: Path
    manifest: Mapping[str, object]
    layout: KVLayout

    @property
    def target(self) -> str:
        return cast("str", self.manifest["target"])

    @property
    def dtype(self) -> str:
        """Dtype of weights, activations and, mostly, caches: float32, float16 or bfloat16."""
        return cast("str", self.manifest["dtype"])

    @property
    def cache_dtype(self) -> str:
        """Dtype of the caches: `dtype`, or int8."""
        return "int8" if self.calibration else self.dtype

    @property
    def calibration(self) -> Mapping[str, object]:
        """Of int8 caches: on what their scales were chosen; empty for others."""
        return cast("Mapping[str, object]", self.manifest.get("kv_cache") or {})

    @property
    def quantization(self) -> Quantization | None:
        """How weights are quantised, if they are."""
        content = cast("dict[str, int] | None", self.manifest.get("quantization"))
        return None if content is None else Quantization(**content)

    @property
    def arithmetic(self) -> str:
        """The dtype, and what has another: `float32, int4 weights, int8 cache`."""
        how = self.quantization
        weights = "" if how is None else f", {how.name} weights"
        return f"{self.dtype}{weights}{', int8 cache' if self.calibration else ''}"

    @property
    def max_positions(self) -> int:
        return cast("dict[str, int]", self.manifest["limits"])["max_positions"]

    @property
    def vocab_size(self) -> int:
        return cast("dict[str, int]", self.manifest["limits"])["vocab_size"]

    @property
    def source(self) -> Path:
        """The model folder it was exported from; it may have moved since."""
        return Path(cast("dict[str, str]", self.manifest["source"])["folder"])

    @property
    def module(self) -> str | None:
        """`package.module:factory` of a model that the user's own code makes."""
        return cast("dict[str, str]", self.manifest["source"]).get("module")

    def module_named(self, named: str | None) -> str | None:
        """What makes its PyTorch module: what the user names, and nothing that a file does.

        Raises:
            BundleError: there has to be one, and none is named; or the other way round.
        """
        if self.module is not None and named is None:
            raise BundleError(
                f"{self.folder}: exported with --module {self.module}, code that is imported only "
                f"where you name it: pass --module {self.module} here too"
            )
        if self.module is None and named is not None:
            raise BundleError(
                f"{self.folder}: exported without --module, so {named} did not make its model; "
                "leave it out"
            )
        return named

    @property
    def notes(self) -> list[str]:
        """What was worth saying of the model folder."""
        return cast("list[str]", self.manifest.get("notes", []))

    @property
    def linked(self) -> list[str]:
        """Files of weights that are the model folder's own, taken in without a copy."""
        return cast("list[str]", self.manifest.get("linked", []))

    @property
    def graph(self) -> Path:
        return self.folder / GRAPH

    @property
    def cpu_graph(self) -> Path | None:
        """The graph with our own attention operator, if the bundle has one."""
        path = self.folder / CPU_GRAPH
        return path if path.is_file() else None

    @property
    def cuda_graph(self) -> Path | None:
        """The graph for NVIDIA GPUs, if the bundle has one."""
        path = self.folder / CUDA_GRAPH
        return path if path.is_file() else None

    @property
    def cuda_plugin_graph(self) -> Path | None:
        """The graph for NVIDIA GPUs with our own operators, if the bundle has one."""
        path = self.folder / CUDA_PLUGIN_GRAPH
        return path if path.is_file() else None

    def special_tokens(self) -> list[int]:
        """Ids of begin, end, padding and unknown that its configs name."""
        found: dict[object, None] = {}
        for name in ("generation_config.json", "config.json"):
            path = self.folder / name
            content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            for key in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
                ids = content.get(key)
                found |= dict.fromkeys(ids if isinstance(ids, list) else [ids])
        return [token for token in found if isinstance(token, int)]

    def expert_choices(self) -> list[str]:
        """A line for the operator that experts ended up as, where there are any."""
        found = cast("dict[str, str] | None", self.manifest.get("experts"))
        return [] if found is None else [f"experts: {found['operator']} ({found['reason']})"]

    def attention_choices(self) -> list[str]:
        """A line for each operator that carries attention: which groups, and why."""
        groups = cast("list[dict[str, str]]", self.manifest.get("groups", []))
        chosen: dict[tuple[str, str], list[str]] = {}
        for group in groups:
            chosen.setdefault((group["attention"], group["reason"]), []).append(str(group["index"]))
        lines = []
        for (operator, reason), indices in chosen.items():
            which = "all groups" if len(chosen) == 1 else f"groups {', '.join(indices)}"
            lines.append(f"{which}: {operator} ({reason})")
        ours = {
            f"on a CPU ({CPU_GRAPH})": "cpu_attention",
            f"on a GPU ({CUDA_PLUGIN_GRAPH})": "cuda_plugin_attention",
        }
        for where, key in ours.items():
            taken = [group.get(key) == "ClaAttention" for group in groups]
            if any(taken):
                which = "all groups" if all(taken) else "groups that it takes"
                lines.append(f"{which}, {where}: ClaAttention (reads a key once)")
        return lines

    def config(self) -> dict[str, object]:
        """The model's own config.json."""
        text = (self.folder / "config.json").read_text(encoding="utf-8")
        return cast("dict[str, object]", json.loads(text))


def engine_folders(bundle: Bundle) -> list[Path]:
    """Folders of the engines that were built from a bundle."""
    return sorted(path.parent for path in (bundle.folder / "engines").glob(f"*/{BUILD_RECORD}"))


@contextlib.contextmanager
def new_folder(
    dest: Path, *, force: bool, needed_bytes: int, manifest: str = MANIFEST
) -> Iterator[Path]:
    """Yield a temporary folder that becomes `dest` if the block ends well, and vanishes if not.

    `manifest` is the file that a folder of its kind has. Raises BundleError when `dest` exists and
    `force` is false, when the disk cannot hold `needed_bytes`, and when it turns out full while
    writing.
    """
    dest = dest.absolute()
    if dest.exists() and not force:
        raise BundleError(f"{dest} exists already; choose another folder or pass --force")
    if dest.exists() and not _replaceable(dest, manifest):
        raise BundleError(
            f"{dest} exists and is not {_KINDS[manifest]} (no {manifest}); --force replaces only "
            f"its like and empty folders"
        )
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        require_space(dest.parent, needed_bytes)
        partial = Path(tempfile.mkdtemp(prefix=f".{dest.name}.partial-", dir=dest.parent))
    except OSError as error:
        raise BundleError(f"{dest}: cannot be written ({error.strerror or error})") from error
    try:
        yield partial
        partial.chmod(0o755)
        _swap(partial, dest)
    except OSError as error:
        if error.errno in _FULL:
            raise BundleError(
                f"{dest.parent}: the disk is full ({error.strerror or error}); nothing was left "
                "behind"
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise BundleError if the disk that a folder is on cannot hold so many more bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise BundleError(f"{folder}: the bundle needs {needed_bytes:,} bytes, {free:,} are free")


def _replaceable(dest: Path, manifest: str) -> bool:
    return dest.is_dir() and ((dest / manifest).is_file() or not any(dest.iterdir()))


def _swap(partial: Path, dest: Path) -> None:
    """Put the finished folder in place; an old one goes only once the new one is there."""
    if not dest.exists():
        partial.rename(dest)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{dest.name}.retired-", dir=dest.parent))
    dest.rename(retired / dest.name)
    try:
        partial.rename(dest)
    except BaseException:  # an interrupt too
        (retired / dest.name).rename(dest)
        raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)


def write_manifest(
    folder: Path,
    manifest: Mapping[str, object],
    progress: Progress,
    known: Mapping[str, str] | None = None,
) -> None:
    """Hash every file in the folder, but for those whose sha256 is known; write bundle.json."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        digest = (known or {}).get(name) or sha256(path, progress)
        files[name] = {"bytes": path.stat().st_size, "sha256": digest}
    write_json(folder / MANIFEST, {"schema": SCHEMA, **manifest, "files": files})


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: Path, progress: Progress | None = None, stop: Event | None = None) -> str:
    """Of a file's bytes; once `stop` is set, of those read so far."""
    digest = hashlib.sha256()
    size, done = path.stat().st_size, 0
    with path.open("rb") as file:
        while (block := file.read(1 << 22)) and not (stop and stop.is_set()):
            digest.update(block)
            done += len(block)
            if progress is not None:
                progress(f"sha256 {path.name}", done, size)
    return digest.hexdigest()


@contextlib.contextmanager
def background_digests(paths: Iterable[Path]) -> Iterator[Callable[[], dict[Path, str]]]:
    """Hash files while the block goes on; what is yielded waits for it, and returns sha256s."""
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: {path: sha256(path, stop=stop) for path in paths})
        try:
            yield running.result
        finally:
            stop.set()


def is_bundle(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def open_bundle(folder: Path | str, *, verify: bool = True) -> Bundle:
    """Open a bundle; with `verify` every file is hashed and compared with bundle.json.

    Raises BundleError for a folder that is no bundle, one of a newer schema, one that misses a
    file, and one whose files were changed after export.
    """
    folder = Path(folder)
    if not is_bundle(folder):
        kind = "a model folder" if (folder / "config.json").is_file() else "not a bundle"
        raise BundleError(
            f"{folder}: {kind if folder.is_dir() else 'not a folder'}; expected a folder with "
            f"{MANIFEST}, as `cla-export export SRC DEST` writes it"
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        schema = manifest["schema"]
        if schema == SCHEMA:
            bundle, files = _read_manifest(folder, manifest)
    except (ValueError, KeyError, TypeError, AttributeError, LayoutError) as error:
        raise BundleError(f"{folder / MANIFEST}: damaged ({error!r}); export again") from error
    if schema != SCHEMA:
        raise BundleError(
            f"{folder / MANIFEST}: schema {schema!r}; this version of cla-export reads {SCHEMA}"
        )
    for name, (size, digest) in files.items():
        _check_file(folder / name, size, digest if verify else None)
    return bundle


def _read_manifest(
    folder: Path, manifest: Mapping[str, object]
) -> tuple[Bundle, dict[str, tuple[int, str]]]:
    """The bundle, and name -> size and sha256 of each file; some error if anything is missing."""
    layout = KVLayout.from_json(cast("dict[str, object]", manifest["kv_layout"]))
    entries = cast("dict[str, dict[str, object]]", manifest["files"]).items()
    files = {name: (int(cast("int", e["bytes"])), str(e["sha256"])) for name, e in entries}
    bundle = Bundle(folder, manifest, layout)
    _ = files[GRAPH], bundle.target, bundle.dtype, bundle.source
    _ = bundle.max_positions + bundle.vocab_size, bundle.quantization, bundle.cache_dtype
    return bundle, files


def _check_file(path: Path, expected: int, digest: str | None) -> None:
    if not path.is_file():
        raise BundleError(f"{path}: missing from the bundle; export again")
    size = path.stat().st_size
    if size != expected:
        raise BundleError(
            f"{path}: {size:,} bytes, {expected:,} when exported; it was changed or truncated. "
            "Export again"
        )
    if digest is not None and sha256(path) != digest:
        raise BundleError(f"{path}: changed after export (its sha256 differs); export again")
