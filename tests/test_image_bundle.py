"""`fednnunet image` without an engine: bundles are written, verified, signed and unpacked; every fault is refused."""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
from commands import FEDNNUNET, Done, begin, end, environment, fednnunet, good, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saved_images import layer, saved

from federation.enrollment import now
from federation.errors import Code, FednnunetError
from orchestrator.bundle import keys, write
from orchestrator.bundle.archive import opened
from orchestrator.bundle.tarfiles import END, header, padding
from orchestrator.bundle.verify import check, docker_archive
from orchestrator.bundle.versions import version_key

LAYERS = [layer(a="lowest " * 999), layer(b="middle"), layer(c="top")]
NEW_LAYERS = [*LAYERS[:2], layer(c="a newer top")]
NO_ENGINE = {"DOCKER_HOST": "unix:///nonexistent/docker.sock"}
NOBODY = "f" * 64


@dataclasses.dataclass(frozen=True)
class Shop:
    """A folder with a signed bundle of 0.2.0, one of the layers that changed in 0.3.0, and two pairs of keys."""

    folder: Path
    bundle: Path
    delta: Path

    @property
    def public(self) -> list[Any]:
        return keys.load_public([self.folder / "signer.pub"])


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("shop")
    for name in ("signer", "foreign"):
        keys.generate(folder / f"{name}.key")
    old, new = folder / "old.tar", folder / "new.tar"
    saved(new, NEW_LAYERS, "0.3.0", oci=True)
    name = saved(old, LAYERS, "0.2.0")
    good(fednnunet("image", "save", name, "--archive", old, "--key", "signer.key", cwd=folder))
    bundle = folder / "fednnunet-appliance-0.2.0-cpu.fnubundle.tar"
    since = ("--since", bundle, "--output", "delta.tar")
    name = "fednnunet/appliance:0.3.0-cpu"
    good(fednnunet("image", "save", name, "--archive", new, "--key", "signer.key", *since, cwd=folder))
    return Shop(folder, bundle, folder / "delta.tar")


def verdict(shop: Shop, data: bytes, moment: dt.datetime | None = None) -> Code | None:
    """What `verify` says of these bytes, without starting a process; None: it accepts them."""
    try:
        check(io.BytesIO(data), "bundle", shop.public, moment or now())
    except FednnunetError as error:
        return error.code
    return None


def members(path: Path) -> dict[str, bytes]:
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            stream = archive.extractfile(member)
            assert stream is not None
            found[member.name] = stream.read()
    return found


def packed(parts: dict[str, bytes]) -> bytes:
    return b"".join(header(name, len(data)) + data + padding(len(data)) for name, data in parts.items()) + END


def signed_again(shop: Shop, parts: dict[str, bytes]) -> bytes:
    """The parts under a manifest that fits them and a good signature: what only the signer could get wrong."""
    small = {name: data for name, data in parts.items() if not name.startswith("SHA256SUMS")}
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in small.items()).encode()
    signature = keys.load_private(shop.folder / "signer.key").sign(sums)
    return packed({"SHA256SUMS": sums, "SHA256SUMS.sig": signature, **small})


def changed(data: bytes, at: int, bit: int = 0) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


# ---- good bundles ----------------------------------------------------------------------------------------------------


def test_a_hospital_can_verify_with_openssl_and_sha256sum_alone(shop: Shop, tmp_path: Path) -> None:
    shutil.copy(shop.folder / "signer.pub", tmp_path)
    tmp_path = tmp_path / "check"
    tmp_path.mkdir()
    subprocess.run(["tar", "xf", str(shop.bundle), "--directory", str(tmp_path)], check=True)
    words = "openssl pkeyutl -verify -pubin -inkey ../signer.pub -rawin -in SHA256SUMS -sigfile SHA256SUMS.sig"
    done = subprocess.run(words.split(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done
    assert "Verified Successfully" in done.stdout
    done = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done
    assert done.stdout.count(": OK") == 2 + len(LAYERS)
    der = subprocess.run(
        ["openssl", "pkey", "-pubin", "-in", "../signer.pub", "-outform", "DER"], cwd=tmp_path, capture_output=True
    )
    assert hashlib.sha256(der.stdout).hexdigest() == json.loads((tmp_path / "bundle.json").read_bytes())["signer"]
    with open(tmp_path / "SHA256SUMS", "ab") as stream:
        stream.write(b"\n")
    assert subprocess.run(words.split(), cwd=tmp_path, capture_output=True).returncode != 0


@pytest.mark.parametrize("oci", [False, True], ids=["legacy", "oci"])
def test_what_is_loaded_is_the_image_that_was_saved_layer_for_layer(tmp_path: Path, oci: bool) -> None:
    layers = [LAYERS[0], LAYERS[1], LAYERS[0]]  # the same layer twice, as an empty one may come
    name = saved(tmp_path / "image.tar", layers, oci=oci)
    good(fednnunet("image", "keygen", "signer.key", cwd=tmp_path))
    assert (tmp_path / "signer.key").stat().st_mode & 0o777 == 0o600
    arguments = ("--archive", "image.tar", "--key", "signer.key", "--output", "b.tar")
    good(fednnunet("image", "save", name, *arguments, cwd=tmp_path, **NO_ENGINE))
    assert "whole, signed by" in good(fednnunet("image", "verify", "b.tar", "--key", "signer.pub", cwd=tmp_path)).out
    arguments = ("--key", "signer.pub", "--to-archive", "out.tar")
    good(fednnunet("image", "load", "b.tar", *arguments, cwd=tmp_path, **NO_ENGINE))
    with opened(tmp_path / "image.tar") as before, opened(tmp_path / "out.tar") as after:
        assert after.raw_config == before.raw_config
        assert after.references == [name]
        for diff_id, data in zip(before.config.diff_ids, layers, strict=True):
            assert b"".join(after.layer(diff_id)) == data
    described = json.loads(good(fednnunet("image", "inspect", "b.tar", cwd=tmp_path)).out)
    assert described["signed"]
    assert not described["verified"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.tar", "image.tar", "out.tar", "signer.key", "signer.pub"]


def test_a_bundle_of_changed_layers_holds_those_alone_and_loads_on_its_base(shop: Shop, tmp_path: Path) -> None:
    names = [name for name in members(shop.delta) if name.startswith("layers/")]
    assert names == [f"layers/{hashlib.sha256(NEW_LAYERS[2]).hexdigest()}.tar.gz"]
    key = ("--key", shop.folder / "signer.pub")
    done = good(fednnunet("image", "verify", shop.delta, *key, cwd=tmp_path))
    assert "2 of 3 layers come from 0.2.0" in done.out
    refused(fednnunet("image", "load", shop.delta, *key, "--to-archive", "x.tar", cwd=tmp_path), 144, "not at hand")
    for base in (shop.bundle, shop.folder / "old.tar"):
        arguments = (*key, "--base", base, "--to-archive", "out.tar")
        good(fednnunet("image", "load", shop.delta, *arguments, cwd=tmp_path, **NO_ENGINE))
        with opened(tmp_path / "out.tar") as after:
            assert [b"".join(after.layer(diff_id)) for diff_id in after.config.diff_ids] == NEW_LAYERS
    assert [path.name for path in tmp_path.iterdir()] == ["out.tar"]


def test_a_base_whose_layer_was_changed_is_refused(shop: Shop, tmp_path: Path) -> None:
    data = (shop.folder / "old.tar").read_bytes()
    (tmp_path / "bad.tar").write_bytes(changed(data, data.index(b"lowest ") + 3))
    arguments = ("--key", shop.folder / "signer.pub", "--base", "bad.tar", "--to-archive", "out.tar")
    refused(fednnunet("image", "load", shop.delta, *arguments, cwd=tmp_path), 144, "changed in the base")
    assert not (tmp_path / "out.tar").exists()


def test_equal_images_give_equal_bundles(shop: Shop, tmp_path: Path) -> None:
    private, moment = keys.load_private(shop.folder / "signer.key"), now()
    with opened(shop.folder / "old.tar") as image:
        for name in ("one", "two"):
            write.write(tmp_path / name, image, image.references, moment, moment, private)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_an_unsigned_bundle_is_refused_until_it_is_signed(shop: Shop, tmp_path: Path) -> None:
    name, key = "fednnunet/appliance:0.2.0-cpu", ("--key", shop.folder / "signer.pub")
    done = good(fednnunet("image", "save", name, "--archive", shop.folder / "old.tar", "--output", "b", cwd=tmp_path))
    assert "NOT SIGNED" in done.out
    refused(fednnunet("image", "verify", "b", *key, cwd=tmp_path), 155)
    good(fednnunet("image", "sign", "b", "--key", shop.folder / "foreign.key", cwd=tmp_path))
    refused(fednnunet("image", "verify", "b", *key, cwd=tmp_path), 145)
    good(fednnunet("image", "sign", "b", "--key", shop.folder / "signer.key", cwd=tmp_path))
    good(fednnunet("image", "verify", "b", *key, cwd=tmp_path))
    (tmp_path / "c").write_bytes(changed((tmp_path / "b").read_bytes(), -3000))
    refused(fednnunet("image", "sign", "c", "--key", shop.folder / "signer.key", "--output", "d", cwd=tmp_path), 141)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]


def test_syft_adds_the_parts_list_where_it_is_there(shop: Shop, tmp_path: Path) -> None:
    """A simulated syft: a script that says which archive it was given."""
    script = tmp_path / "bin" / "syft"
    script.parent.mkdir()
    script.write_text('#!/bin/sh\nprintf \'{"bomFormat":"CycloneDX","asked":"%s"}\' "$1"\n')
    script.chmod(0o755)
    name, old = "fednnunet/appliance:0.2.0-cpu", shop.folder / "old.tar"
    arguments = ("--archive", old, "--key", shop.folder / "signer.key", "--output", "b.tar")
    done = good(fednnunet("image", "save", name, *arguments, cwd=tmp_path, PATH=f"{script.parent}:/usr/bin:/bin"))
    assert "syft is not on the PATH" not in done.out
    assert json.loads(members(tmp_path / "b.tar")["sbom.cdx.json"])["asked"] == f"docker-archive:{old}"
    good(fednnunet("image", "verify", "b.tar", "--key", shop.folder / "signer.pub", cwd=tmp_path))
    script.write_text("#!/bin/sh\necho no such >&2; exit 3\n")
    refused(
        fednnunet("image", "save", name, *arguments, cwd=tmp_path, PATH=f"{script.parent}:/usr/bin:/bin"),
        150,
        "no such",
    )
    done = good(fednnunet("image", "save", name, *arguments, cwd=tmp_path, PATH="/nonexistent"))
    assert "syft is not on the PATH" in done.out


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inside", "number"),
    [
        ("SHA256SUMS", 142),
        ("SHA256SUMS.sig", 143),
        ("bundle.json", 141),
        ("config.json", 141),
        ("layers/", 141),
    ],
)
def test_a_changed_byte_is_refused_and_nothing_is_loaded(shop: Shop, tmp_path: Path, inside: str, number: int) -> None:
    data = shop.bundle.read_bytes()
    name, content = next((n, c) for n, c in members(shop.bundle).items() if n == inside or inside[-1] == "/" in n)
    at = data.index(header(name, len(content))) + 512 + min(20, len(content) - 1)
    (tmp_path / "b.tar").write_bytes(changed(data, at))
    key = ("--key", shop.folder / "signer.pub")
    refused(fednnunet("image", "verify", "b.tar", *key, cwd=tmp_path), number, "b.tar")
    refused(fednnunet("image", "load", "b.tar", *key, cwd=tmp_path, **NO_ENGINE), number)
    refused(fednnunet("image", "load", "b.tar", *key, "--to-archive", "out.tar", cwd=tmp_path), number)
    assert [path.name for path in tmp_path.iterdir()] == ["b.tar"]


def test_no_byte_of_a_bundle_can_be_changed(shop: Shop) -> None:
    data = shop.bundle.read_bytes()
    assert verdict(shop, data) is None
    for at in range(len(data)):
        code = verdict(shop, changed(data, at, at % 8))
        assert code is not None, f"byte {at} of {len(data)}"
        assert 140 <= code.number <= 145 or code is Code.BUNDLE_UNSIGNED, (at, code)


def test_a_bundle_cut_anywhere_is_refused(shop: Shop) -> None:
    data = shop.bundle.read_bytes()
    for end_at in [*range(0, len(data), 101), len(data) - 1, len(data) - 512]:
        assert verdict(shop, data[:end_at]) in {Code.BUNDLE_UNREADABLE, Code.BUNDLE_CHANGED}, end_at
    assert verdict(shop, data + b"\0") is Code.BUNDLE_CHANGED


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.binary(max_size=2000), at=st.integers(0, 12000), keep=st.booleans())
def test_garbage_is_refused_with_a_number(shop: Shop, garbage: bytes, at: int, keep: bool) -> None:
    data = shop.bundle.read_bytes()
    mixed = data[:at] + garbage + data[at if keep else at + len(garbage) :]
    code = verdict(shop, mixed)
    assert (code is None) == (mixed == data)


def test_a_bundle_without_one_of_its_layers_is_refused(shop: Shop, tmp_path: Path) -> None:
    for gone in [name for name in members(shop.bundle) if name.startswith("layers/")]:
        parts = members(shop.bundle)
        del parts[gone]
        (tmp_path / "b.tar").write_bytes(packed(parts))
        refused(fednnunet("image", "verify", "b.tar", "--key", shop.folder / "signer.pub", cwd=tmp_path), 144, gone)
        assert verdict(shop, signed_again(shop, parts)) is Code.LAYER_MISSING
    name = saved(tmp_path / "short.tar", LAYERS, left_out=1)
    refused(fednnunet("image", "save", name, "--archive", "short.tar", cwd=tmp_path), 144, "short.tar")
    assert not list(tmp_path.glob("*.fnubundle.tar"))


def test_a_key_that_is_not_trusted_is_refused(shop: Shop, tmp_path: Path) -> None:
    foreign = shop.folder / "foreign.pub"
    refused(fednnunet("image", "verify", shop.bundle, "--key", foreign, cwd=tmp_path), 145, "trusted here")
    both = ("--key", foreign, "--key", shop.folder / "signer.pub")
    good(fednnunet("image", "verify", shop.bundle, *both, cwd=tmp_path))
    refused(fednnunet("image", "verify", shop.bundle, "--key", shop.folder / "signer.key", cwd=tmp_path), 154)
    refused(fednnunet("image", "keygen", shop.folder / "signer.key", cwd=tmp_path), 154, "is there already")


def test_the_signature_of_another_bundle_does_not_fit(shop: Shop) -> None:
    parts = members(shop.bundle)
    other = members(shop.delta)["SHA256SUMS.sig"]
    assert verdict(shop, packed({**parts, "SHA256SUMS.sig": other})) is Code.BUNDLE_SIGNATURE_CHANGED


def test_a_bundle_is_refused_after_its_last_day_and_before_its_first(shop: Shop, tmp_path: Path) -> None:
    data = shop.bundle.read_bytes()
    assert verdict(shop, data, now() + dt.timedelta(days=91)) is Code.BUNDLE_DATES
    assert verdict(shop, data, now() - dt.timedelta(days=1)) is Code.BUNDLE_DATES
    arguments = ("--archive", shop.folder / "old.tar", "--key", shop.folder / "signer.key", "--output", "b.tar")
    good(fednnunet("image", "save", "fednnunet/appliance:0.2.0-cpu", *arguments, "--days", 0, cwd=tmp_path))
    time.sleep(1.1)
    refused(fednnunet("image", "load", "b.tar", "--key", shop.folder / "signer.pub", cwd=tmp_path), 146, "has expired")


def test_an_older_version_is_refused_unless_it_is_said_aloud(shop: Shop, tmp_path: Path) -> None:
    load = ("image", "load", shop.bundle, "--key", shop.folder / "signer.pub", "--to-archive", "out.tar", "--installed")
    refused(fednnunet(*load, "0.10.0", cwd=tmp_path), 147, "0.10.0 is installed", "0.2.0")
    assert not list(tmp_path.iterdir())
    done = good(fednnunet(*load, "0.10.0", "--allow-downgrade", cwd=tmp_path))
    assert "WARNING: DOWNGRADE" in done.err
    for same_or_older in ("0.2.0", "0.2.0rc1", "0.1.9"):
        assert "DOWNGRADE" not in good(fednnunet(*load, same_or_older, cwd=tmp_path)).err


def test_without_an_engine_only_the_load_itself_fails(shop: Shop, tmp_path: Path) -> None:
    key = ("--key", shop.folder / "signer.pub")
    done = refused(fednnunet("image", "load", shop.bundle, *key, cwd=tmp_path, **NO_ENGINE), 148)
    assert "whole, signed by" in done.out
    for words in (["list"], ["inspect", "nothing"], ["push", "nothing"], ["prune", "--yes"], ["save", "nothing"]):
        refused(fednnunet("image", *words, cwd=tmp_path, **NO_ENGINE), 148)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "layers/../../outside", "bundle.json"])
def test_a_member_with_another_name_is_refused(shop: Shop, tmp_path: Path, name: str) -> None:
    parts = members(shop.bundle)
    data = packed(parts)[: -len(END)] + header(name, 4) + b"evil" + padding(4) + END
    assert verdict(shop, data) is Code.BUNDLE_CHANGED
    (tmp_path / "b.tar").write_bytes(signed_again(shop, {**parts, name: b"evil"}) if name not in parts else data)
    arguments = ("--key", shop.folder / "signer.pub", "--to-archive", "out.tar")
    done = fednnunet("image", "load", "b.tar", *arguments, cwd=tmp_path)
    refused(done, 142 if name not in parts else 141)
    assert [path.name for path in tmp_path.iterdir()] == ["b.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_member_that_is_no_file_is_refused(shop: Shop, kind: bytes) -> None:
    info = tarfile.TarInfo("layers/link")
    info.type, info.linkname, info.mode = kind, "/etc/passwd", 0o644
    data = shop.bundle.read_bytes()[: -len(END)] + info.tobuf(tarfile.GNU_FORMAT) + END
    assert verdict(shop, data) is Code.BUNDLE_CHANGED


def test_a_file_that_changes_after_it_was_verified_gives_no_archive_that_can_be_loaded(shop: Shop) -> None:
    data = shop.bundle.read_bytes()
    for at in (600, data.index(b"layers/", 3000) + 700):
        stream = io.BytesIO(data)
        front, _ = check(stream, "bundle", shop.public, now())
        stream.seek(at)
        stream.write(bytes([data[at] ^ 1]))
        written = b""
        with pytest.raises(FednnunetError) as caught:
            for piece in docker_archive(stream, "bundle", front):
                written += piece
        assert caught.value.code in {Code.BUNDLE_CHANGED, Code.BUNDLE_MANIFEST_CHANGED}
        assert b"manifest.json" not in written


def test_a_bomb_does_not_unpack(shop: Shop) -> None:
    """Signed by a trusted key, even so: the layer says 1 KiB and would unpack to 1 GiB."""
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(pack.compress(bytes(1 << 20)) for _ in range(1024)) + pack.flush()
    parts = members(shop.bundle)
    name = next(name for name in parts if name.startswith("layers/"))
    parts[name] = bomb
    data = signed_again(shop, parts)
    tracemalloc.start()
    try:
        assert verdict(shop, data) is Code.BUNDLE_CHANGED
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_a_header_that_claims_a_huge_manifest_does_not_fill_memory(shop: Shop) -> None:
    data = header("SHA256SUMS", 2**40) + shop.bundle.read_bytes()[512:]
    assert verdict(shop, data) is Code.BUNDLE_CHANGED


@pytest.mark.parametrize(
    ("labels", "named"), [({"version": ""}, "version"), ({"version": "newest"}, "newest"), ({"title": ""}, "title")]
)
def test_an_image_without_title_or_version_is_not_saved(tmp_path: Path, labels: dict[str, str], named: str) -> None:
    name = saved(tmp_path / "image.tar", LAYERS, **labels)  # type: ignore[arg-type]
    refused(fednnunet("image", "save", name, "--archive", "image.tar", cwd=tmp_path), 150, named)
    assert [path.name for path in tmp_path.iterdir()] == ["image.tar"]


def test_a_folder_or_a_wrong_name_where_a_file_belongs_is_refused(shop: Shop, tmp_path: Path) -> None:
    folder, key = tmp_path / "folder", ("--key", shop.folder / "signer.pub")
    folder.mkdir()
    private = ("--key", shop.folder / "signer.key")
    save = ("image", "save", "fednnunet/appliance:0.2.0-cpu", "--archive")
    refused(fednnunet(*save, shop.folder / "old.tar", "--output", folder, cwd=tmp_path), 112, "is a folder")
    refused(fednnunet("image", "sign", shop.bundle, *private, "--output", folder, cwd=tmp_path), 112)
    refused(fednnunet("image", "load", shop.bundle, *key, "--to-archive", folder, cwd=tmp_path), 112)
    refused(fednnunet(*save, folder, cwd=tmp_path), 150)
    refused(fednnunet("image", "verify", folder, *key, cwd=tmp_path), 140)
    refused(fednnunet("image", "verify", shop.bundle, "--key", folder, cwd=tmp_path), 154)
    refused(fednnunet("image", "keygen", "signer.pub", cwd=tmp_path), 154)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert not list(folder.iterdir())


def test_what_is_no_archive_is_not_saved(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a tar file")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    for name in ("text", "absent"):
        refused(fednnunet("image", "save", "x:1", "--archive", name, cwd=tmp_path), 150, name)
    refused(fednnunet("image", "save", "x:1", "--archive", "empty.tar", cwd=tmp_path), 144, "manifest.json")
    saved(tmp_path / "image.tar", LAYERS)
    refused(fednnunet("image", "save", "x:1", "--archive", "image.tar", cwd=tmp_path), 150, "fednnunet/appliance")
    good(fednnunet("image", "keygen", "k.key", cwd=tmp_path))
    for name in ("text", "absent"):
        refused(fednnunet("image", "verify", name, "--key", "k.pub", cwd=tmp_path), 140, name)


def test_a_full_disk_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """A limit on the size of files (40 blocks of 1 KiB) stands for the full disk."""
    name = saved(tmp_path / "image.tar", [layer(noise=random.Random(1).randbytes(2**17).hex())])
    good(fednnunet("image", "keygen", "s.key", cwd=tmp_path))
    arguments = ("--archive", "image.tar", "--key", "s.key", "--output", "b.tar")
    limited = ["bash", "-c", 'ulimit -f 40; exec "$0" "$@"', sys.executable, "-m", FEDNNUNET, "image"]
    words = [*limited, "save", name, *arguments]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    refused(Done(done.returncode, done.stdout, done.stderr), 702)
    good(fednnunet("image", "save", name, *arguments, cwd=tmp_path))
    words = [*limited, "load", "b.tar", "--key", "s.pub", "--to-archive", "out.tar"]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    refused(Done(done.returncode, done.stdout, done.stderr), 702)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.tar", "image.tar", "s.key", "s.pub"]


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    noise = random.Random(1).randbytes(200 * 2**20).hex()
    name = saved(tmp_path / "image.tar", [layer(noise=noise)])
    before = sorted(path.name for path in tmp_path.iterdir())
    process = begin(FEDNNUNET, "image", "save", name, "--archive", "image.tar", cwd=tmp_path)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob(".*layers-*/*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert end(process).status == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "ordered",
    [["0.9.0", "0.10.0"], ["1.0.0.dev1", "1.0.0a1", "1.0.0b2", "1.0.0rc1", "1.0", "1.0.0.post1", "1.0.1"], ["1", "v2"]],
)
def test_versions_are_ordered_as_people_read_them(ordered: list[str]) -> None:
    found = [version_key(text) for text in ordered]
    assert None not in found
    assert sorted(found, key=lambda key: key or ((), 0, 0)) == found
    assert version_key("1.0") == version_key("1.0.0+local")
    assert version_key("latest") is None


def test_the_bundle_format_knows_no_engine() -> None:
    """`verify` must work where Docker's library is absent: a hospital may check on any machine."""
    script = "import sys; sys.modules['docker'] = None; from orchestrator.admin.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "image", "verify", "absent", "--key", "absent"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.stderr.startswith("FNU-154"), done
