"""`fednnunet image` with the Docker engine that DOCKER_HOST names; a small stand-in plays the registry."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import tarfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Done, fednnunet, good, refused
from saved_images import layer, saved

pytestmark = pytest.mark.containers
DOCKER = os.environ.get("DOCKER", "docker")
LAYERS = [layer(a="lowest " * 999), layer(b="middle"), layer(c="top")]
NEW_LAYERS = [*LAYERS[:2], layer(c="a newer top")]


def docker(*words: object) -> str:
    done = subprocess.run([DOCKER, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, f"docker {words}: {done.stdout}{done.stderr}"
    return done.stdout


class House:
    """A folder, and images in the engine under a title of this test's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.title = f"fednnunet-test{uuid.uuid4().hex[:10]}"
        good(self.image("keygen", "signer.key"))

    def image(self, *words: object) -> Done:
        return fednnunet("image", *words, cwd=self.folder)

    def put(self, version: str, layers: list[bytes]) -> str:
        path = self.folder / "put.tar"
        name = saved(path, layers, version, self.title)
        docker("load", "--input", path)
        path.unlink()
        return name

    def bundle(self, name: str, output: str, *more: object) -> str:
        good(self.image("save", name, "--key", "signer.key", "--output", output, *more))
        return output

    def versions(self) -> list[str]:
        lines = [line.split("\t") for line in good(self.image("list")).out.splitlines()]
        return [fields[1] for fields in lines if fields[2] == self.title]

    def forget(self) -> None:
        wanted = f"label=org.opencontainers.image.title={self.title}"
        for container in docker("ps", "--all", "--quiet", "--filter", wanted).split():
            docker("rm", "--force", container)
        for identity in dict.fromkeys(docker("images", "--quiet", "--filter", wanted).split()):
            docker("rmi", "--force", identity)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    docker("version")
    made = House(tmp_path)
    yield made
    made.forget()


def content(reference: str, folder: Path) -> list[str]:
    """Diff ids of the image in the engine, from an archive that the engine itself writes."""
    path = folder / "check.tar"
    docker("save", "--output", path, reference)
    found = []
    with tarfile.open(path) as archive:
        stream = archive.extractfile("manifest.json")
        assert stream is not None
        for name in json.load(stream)[0]["Layers"]:
            data = archive.extractfile(name)
            assert data is not None
            found.append(hashlib.sha256(data.read()).hexdigest())
    path.unlink()
    return found


def test_an_image_goes_from_one_engine_into_a_bundle_and_back(house: House) -> None:
    name = house.put("0.2.0", LAYERS)
    bundle = house.bundle(name, "b.tar")
    described = json.loads(good(house.image("inspect", name)).out)
    assert (described["title"], described["version"], len(described["diff_ids"])) == (house.title, "0.2.0", 3)
    house.forget()
    refused(house.image("inspect", name), 149, name)
    good(house.image("load", bundle, "--key", "signer.pub"))
    assert house.versions() == ["0.2.0"]
    assert content(name, house.folder) == [hashlib.sha256(data).hexdigest() for data in LAYERS]
    assert json.loads(good(house.image("inspect", name)).out)["id"] == described["id"]


def test_an_image_is_saved_under_its_name_however_it_was_asked_for(house: House) -> None:
    name = house.put("0.2.0", LAYERS)
    other = name.replace(":0.2.0-cpu", ":latest")
    docker("tag", name, other)
    identity = docker("images", "--quiet", name).strip()
    for asked, expected in ((other.removesuffix(":latest"), {other}), (identity, {name, other}), (name, {name})):
        described = json.loads(good(house.image("inspect", house.bundle(asked, "b.tar"))).out)
        assert len(described["references"]) == 1
        assert set(described["references"]) <= expected


def test_a_refused_bundle_leaves_the_engine_as_it_was(house: House) -> None:
    bundle = house.bundle(house.put("0.2.0", LAYERS), "b.tar")
    house.forget()
    data = bytearray((house.folder / bundle).read_bytes())
    data[-2000] ^= 1
    (house.folder / "bad.tar").write_bytes(data)
    refused(house.image("load", "bad.tar", "--key", "signer.pub"), 141)
    assert house.versions() == []


def test_an_older_version_than_the_installed_one_is_refused(house: House) -> None:
    old = house.bundle(house.put("0.9.0", LAYERS), "old.tar")
    house.forget()
    house.put("0.10.0", NEW_LAYERS)
    refused(house.image("load", old, "--key", "signer.pub"), 147, "0.10.0 is installed")
    assert house.versions() == ["0.10.0"]
    done = good(house.image("load", old, "--key", "signer.pub", "--allow-downgrade"))
    assert "WARNING: DOWNGRADE" in done.err
    assert house.versions() == ["0.10.0", "0.9.0"]


def test_changed_layers_alone_load_on_the_image_in_the_engine(house: House) -> None:
    old = house.put("0.2.0", LAYERS)
    new = house.put("0.3.0", NEW_LAYERS)
    delta = house.bundle(new, "delta.tar", "--since", old)
    with tarfile.open(house.folder / delta) as archive:
        assert len([name for name in archive.getnames() if name.startswith("layers/")]) == 1
    house.forget()
    refused(house.image("load", delta, "--key", "signer.pub"), 144, "not in the engine")
    house.put("0.2.0", LAYERS)
    good(house.image("load", delta, "--key", "signer.pub"))
    assert content(new, house.folder) == [hashlib.sha256(data).hexdigest() for data in NEW_LAYERS]


def test_docker_load_takes_the_archive_that_was_written_without_an_engine(house: House) -> None:
    name = house.put("0.2.0", LAYERS)
    bundle = house.bundle(name, "b.tar")
    house.forget()
    good(house.image("load", bundle, "--key", "signer.pub", "--to-archive", "out.tar"))
    docker("load", "--input", house.folder / "out.tar")
    assert content(name, house.folder) == [hashlib.sha256(data).hexdigest() for data in LAYERS]


def test_prune_keeps_the_newest_versions_and_what_a_container_uses(house: House) -> None:
    names = [house.put(version, [*LAYERS, layer(d=version)]) for version in ("0.1.0", "0.2.0", "0.9.0", "0.10.0")]
    docker("create", names[0], "/nothing")
    refused(house.image("prune", "--title", house.title), 112, "confirm")
    assert len(house.versions()) == 4
    done = good(house.image("prune", "--yes", "--keep", 2, "--title", house.title))
    assert f"in use by a container, stays: {names[0]}" in done.out
    assert house.versions() == ["0.10.0", "0.9.0", "0.1.0"]


class StandInRegistry(http.server.BaseHTTPRequestHandler):
    """Takes what is pushed, as the registry's interface says; forgets it at the end."""

    protocol_version = "HTTP/1.1"
    blobs: dict[str, bytes]
    manifests: dict[str, bytes]

    def log_message(self, *_arguments: object) -> None:
        pass

    def answer(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": "0"} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def do_GET(self) -> None:
        self.answer(200 if self.path == "/v2/" else 404)

    def do_HEAD(self) -> None:
        data = self.blobs.get(self.path.rsplit("/", 1)[-1])
        if data is None:
            self.answer(404)
        else:
            self.answer(200, Content_Length=str(len(data)))

    def do_POST(self) -> None:
        self.body()
        self.answer(202, Location=f"http://{self.headers['Host']}/upload/{uuid.uuid4()}", Range="0-0")

    def do_PATCH(self) -> None:
        self.blobs[self.path.split("?")[0]] = data = self.body()
        self.answer(202, Location=f"http://{self.headers['Host']}{self.path}", Range=f"0-{len(data) - 1}")

    def do_PUT(self) -> None:
        data = self.body()
        if "/manifests/" in self.path:
            self.manifests[self.path] = data
            self.answer(201, Docker_Content_Digest=f"sha256:{hashlib.sha256(data).hexdigest()}")
            return
        data = self.blobs.pop(self.path.split("?")[0], b"") + data
        self.blobs[f"sha256:{hashlib.sha256(data).hexdigest()}"] = data
        self.answer(201)


def test_push_hands_every_layer_to_the_registry(house: House) -> None:
    handler = type("Handler", (StandInRegistry,), {"blobs": {}, "manifests": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        name = f"127.0.0.1:{server.server_port}/fednnunet/appliance:0.2.0"
        docker("tag", house.put("0.2.0", LAYERS), name)
        done = good(house.image("push", name))
        [manifest] = handler.manifests.values()
        assert f"pushed {name} sha256:{hashlib.sha256(manifest).hexdigest()}" in done.out
        described = json.loads(manifest)
        assert {part["digest"] for part in (described["config"], *described["layers"])} == set(handler.blobs)
    finally:
        server.shutdown()
        server.server_close()
    refused(house.image("push", name), 152)
    refused(house.image("push", "fednnunet/nothing:1"), 149)


def test_build_makes_an_image_without_network_from_the_wheelhouse(house: House) -> None:
    """A small Dockerfile stands for the real ones: it mounts the wheels and carries the labels."""
    root = house.folder / "repository"
    (root / "images").mkdir(parents=True)
    (root / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "0.4.0"\n')
    (root / "images" / "appliance.Dockerfile").write_text(
        "ARG BASE_IMAGE=scratch\nFROM ${BASE_IMAGE}\nARG VERSION\nARG TORCH\nARG REVISION\nARG CREATED\n"
        f'LABEL org.opencontainers.image.title="{house.title}" org.opencontainers.image.version="$VERSION"\n'
        "COPY build/wheels /wheels\n"
    )
    wheels = root / "build" / "wheels" / "cpu" / "torch"
    wheels.mkdir(parents=True)
    refused(house.image("build", "appliance", "--context", root), 151, "no wheels")
    (wheels / "a-1-py3-none-any.whl").write_text("a wheel")
    tag = f"{house.title}:built"
    good(house.image("build", "appliance", "--context", root, "--tag", tag))
    described = json.loads(good(house.image("inspect", tag)).out)
    assert (described["title"], described["version"]) == (house.title, "0.4.0")
    (root / "images" / "appliance.Dockerfile").write_text("FROM scratch\nCOPY absent /\n")
    done = house.image("build", "appliance", "--context", root, "--tag", tag)
    assert (done.status, "FNU-151" in done.err) == (11, True), done
