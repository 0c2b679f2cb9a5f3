"""Light simulated sites: they answer every task at once with invented numbers, so that the rest can be measured.

A `LightSite` takes the worker's place behind a real link: real spool, real supernode, real network. A `LightClient`
takes the place of the whole hospital at the real hospitals' listener, many in one process: real keys, real signatures,
real TLS, Flower's real Fleet API. Neither trains anything.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.app import Message, RecordDict
from flwr.app.message import make_message
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from appliance.link.trust import Trust
from appliance.spool import Spool
from appliance.worker.fingerprint import CaseStatistics, channel_statistics, site_fingerprint
from federation import keypairs, signing, tasks, weights
from federation.flower import clients
from federation.flower.supernode import rest
from federation.flower.transfer import Transfer, content, file_array
from federation.tasks import Kind, Result, Task

CASES = 40
HEARTBEAT = 30.0  # seconds, as Flower's own
CT_SPACING, CT_SHAPE = (2.5, 0.8, 0.8), (180, 512, 512)
"""A large CT: nnU-Net plans its default 31 M network for it."""


class Light:
    """What a light site answers.

    Parameters
    ----------
    folder : Path
        Where it makes its updates.
    name : str
        Its name; its numbers follow from it.
    weights : Path
        Where the global weights that it has are kept; many sites may share it, for all have the same.
    """

    def __init__(self, folder: Path, name: str, weights: Path) -> None:
        self._folder, self._weights = folder, weights
        for each in (folder, weights):
            each.mkdir(parents=True, exist_ok=True)
        self._random = np.random.default_rng(list(name.encode()))  # no two sites send the same chunk

    def answer(self, task: Task, arrived: Path | None) -> tuple[Result, Path | None]:
        """The answer to a task, and the update that goes with it.

        Parameters
        ----------
        task : Task
            What is asked.
        arrived : Path or None
            The weights file that came with it.
        """
        match task.kind:
            case Kind.DESCRIBE:
                return Result.answering(task, description=tasks.Description(training_cases=CASES, test_cases=0)), None
            case Kind.FINGERPRINT:
                channel = channel_statistics(self._random.normal(80.0, 120.0, 20_000).astype(np.float32))
                cases = [CaseStatistics(CT_SPACING, CT_SHAPE, 1.0, (channel,)) for _ in range(CASES)]
                return Result.answering(task, fingerprint=site_fingerprint(cases, 1)), None
            case Kind.PREPARE:
                assert task.plan is not None
                report = tasks.Preparation(
                    plans_sha256=task.plan.plans_sha256,
                    training_cases=dict.fromkeys(task.study.folds, CASES),
                    device="light simulated site",
                )
                return Result.answering(task, preparation=report), None
            case Kind.TRAIN:
                return self._train(task, arrived)
            case Kind.VALIDATE:
                self._open(task, arrived)
                return Result.answering(task, validation=tasks.Validation(seconds=0.0)), None
            case Kind.FINISH:
                assert task.weights is not None
                return Result.answering(task, finished=tasks.Finished(model_sha256=task.weights.digest)), None
            case Kind.COMPARE:
                raise NotImplementedError("a light site has nothing to compare")

    def _open(self, task: Task, arrived: Path | None) -> Path:
        assert task.weights is not None
        target = self._weights / f"{task.weights.digest}.safetensors"

        def base(digest: str) -> Path | None:
            path = self._weights / f"{digest}.safetensors"
            return path if path.exists() else None

        own = self._folder / "opened"
        opened = weights.open_weights(task.weights, arrived, base, own)
        if opened != target:
            with contextlib.suppress(FileExistsError):
                target.hardlink_to(opened)
        own.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another site has just removed it
            for old in sorted(self._weights.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)[:-2]:
                old.unlink()
        return target

    def _train(self, task: Task, arrived: Path | None) -> tuple[Result, Path | None]:
        base = self._open(task, arrived)
        assert task.weights is not None
        assert task.plans_sha256 is not None
        file, new = weights.TensorFile(base), self._folder / "new"

        def moved(name: str) -> np.ndarray:
            value = file.read(name)
            value += np.float32(1e-3) * self._random.standard_normal(value.shape, np.float32)
            return value

        digest = weights.write_tensors(new, file.specs, moved)
        header = weights.describe_full(new, digest)
        if task.study.wire != "full":
            carry = self._folder / "carry"
            weights.encode_difference(new, base, carry, self._folder / "difference", carry, task.study.wire)
            new.unlink()
            new = self._folder / "difference"
            header = weights.describe_difference(new, task.weights.digest, digest)
        epochs = task.study.epochs_per_round
        report = tasks.Training(
            plans_sha256=task.plans_sha256,
            cases=CASES,
            epochs=epochs,
            learning_rate=[0.01] * epochs,
            train_loss=[0.0] * epochs,
            val_loss=[0.0] * epochs,
            pseudo_dice=[[0.0]] * epochs,
            seconds={},
        )
        return Result.answering(task, training=report, weights=header), new


class LightSite(threading.Thread):
    """One simulated site that answers what lies in a spool.

    Parameters
    ----------
    state : Path
        The site's state folder, shared with its link.
    """

    def __init__(self, state: Path) -> None:
        super().__init__(daemon=True, name=f"light {state.parent.name}")
        self._spool = Spool(state / "spool")
        self._light = Light(state / "light", state.parent.name, state / "light" / "weights")
        self._stopped = threading.Event()

    def run(self) -> None:
        """Answer until stopped."""
        while not self._stopped.is_set():
            for task in self._spool.waiting():
                self._spool.put_result(task, *self._light.answer(task, self._spool.task_parcel(task).weights))
            time.sleep(0.02)

    def stop(self) -> None:
        """Answer nothing more; returns when the last answer is out."""
        self._stopped.set()
        self.join()


class _Fleet:
    """The Fleet API in the words of the Runtime API, which federation.flower.transfer speaks."""

    def __init__(self, client: Any, node: Node) -> None:
        self._client, self._node = client, node
        self.PullObject, self.PushObject = client.PullObject, client.PushObject
        self.ConfirmMessageReceived = client.ConfirmMessageReceived

    def PullMessages(self, request: Any) -> Any:  # noqa: N802 - Flower's name
        """What waits for this node."""
        return self._client.PullMessages(PullMessagesRequest(node=self._node))

    def PushMessages(self, request: Any) -> Any:  # noqa: N802 - Flower's name
        """An answer of this node."""
        return self._client.PushMessages(
            PushMessagesRequest(
                node=self._node,
                messages_list=request.messages_list,
                message_object_trees=request.message_object_trees,
                clientapp_runtime_list=[0.0],
            )
        )


class LightClient(threading.Thread):
    """One simulated hospital at the hospitals' listener.

    Parameters
    ----------
    name : str
        Its name.
    address : str
        HOST:PORT of the listener.
    ca : bytes
        PEM certificate of the authority.
    coordinator : Path
        The coordinator's public key.
    folder : Path
        Its own; holds its key. The global weights lie beside it, for all sites there.
    poll : float
        Seconds between two looks.
    """

    def __init__(self, name: str, address: str, ca: bytes, coordinator: Path, folder: Path, poll: float) -> None:
        super().__init__(daemon=True, name=f"light {name}")
        self._site, self._folder, self._poll = name, folder, poll
        self._light = Light(folder / "light", name, folder.parent / "weights")
        self._key = keypairs.load_private((folder / "site.key").read_bytes(), name)
        trusted = keypairs.load_public(coordinator.read_bytes(), str(coordinator))
        self._trust = Trust(name, trusted, folder / "arrivals.jsonl")
        self._client = clients.fleet_client(address, ca, folder / "site.key")
        self._public = (folder / "site.pub").read_bytes()
        self._stopped = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Answer until stopped; what went wrong stands in `failure`."""
        try:
            self._serve()
        except BaseException as error:  # noqa: BLE001 - told by whoever measures
            self.failure = error

    def _serve(self) -> None:
        key = public_key_to_bytes(load_ssh_public_key(self._public))  # type: ignore[arg-type]
        request = ActivateNodeRequest(public_key=key, heartbeat_interval=HEARTBEAT)
        node = Node(node_id=self._client.ActivateNode(request).node_id)
        threading.Thread(target=self._beat, args=(node,), daemon=True).start()
        worked, looked = time.monotonic(), 0.0
        while not self._stopped.wait(rest(self._poll, time.monotonic() - worked, looked)):
            fleet = _Fleet(self._client, node)
            began = time.monotonic()
            found = Transfer(fleet, node.node_id, 0).ready()
            looked = time.monotonic() - began
            for ready in found:
                metadata = metadata_from_proto(ready.proto.metadata)
                transfer = Transfer(fleet, node.node_id, metadata.run_id)
                arrived = self._folder / "arrived.safetensors"
                received = transfer.take(ready, arrived, 2**31, self._stopped.is_set)
                task, nonce = self._trust.open(received.body)
                result, update = self._light.answer(task, arrived if received.has_weights else None)
                body, _ = signing.sign("answer", result.model_dump_json(), self._site, self._key, nonce)
                weights = file_array(update) if update is not None else None
                asked = make_message(metadata=metadata, content=RecordDict())
                transfer.push(Message(content(body, weights), reply_to=asked))
                for moved in (arrived, update):  # so that the disk holds many sites
                    if moved is not None:
                        moved.unlink(missing_ok=True)
                worked = time.monotonic()

    def _beat(self, node: Node) -> None:
        """A sign of life beside the transfers, as a supernode gives it."""
        while not self._stopped.wait(HEARTBEAT / 2):
            with contextlib.suppress(clients.HTTPError):
                self._client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT))

    def stop(self) -> None:
        """Answer nothing more; a look that is held ends within 20 s."""
        self._stopped.set()
