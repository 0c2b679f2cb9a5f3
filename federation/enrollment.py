"""Invitation and request: how a hospital and the coordinator come to know each other's keys, with no service between.

Rules:

- Both are canonical JSON in a file of at most 16 KiB. Bytes that are not the one spelling of what they say are refused,
  so no byte can be changed.
- An invitation (orchestrator -> hospital) is signed by the coordinator's key that it holds: that shows it whole, not
  genuine. Genuine is what has the same fingerprint on the phone.
- A request (hospital -> orchestrator) is signed by the site's key: whoever sends it has the private key. It holds the
  invitation's token as a proof over site and key, never the token itself; the orchestrator keeps the token's SHA-256.
- A renewal holds no proof: it is signed by the key that is registered, and by the one that shall follow it.
- A fingerprint is six words and six digits (68 bits) of the SHA-256 of a public key.
- A rotation statement names the coordinator's next key, signed by the key before and by itself.

Worked example::

    fednnunet site invite hospital_a ...  -> hospital_a.invitation.json      {site, endpoint, CA, key, token, dates}
    appliance enroll hospital_a.invitation.json  -> hospital_a.request.json  {site, public key, proof(token, key)}
    fednnunet site approve hospital_a.request.json                           words are compared, the key is registered
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import hmac
import json
import secrets
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from federation import keypairs
from federation.errors import Code, FednnunetError
from federation.files import canonical_json
from federation.keypairs import PrivateKey, PublicKey
from federation.study import SiteName
from federation.words import WORDS

MAX_BYTES = 16 * 1024
"""Bytes of an invitation or a request."""
SKEW = dt.timedelta(minutes=15)
"""How far the clocks of two houses may be apart."""
PATH = "/v1/enroll"
"""Where a request goes online, at the hospitals' listener."""
ENDPOINT = r"^([A-Za-z0-9._-]{1,253}|\[[0-9a-fA-F:.]{2,45}\]):[0-9]{1,5}$"

Hex = Annotated[str, Field(pattern=r"^[0-9a-f]+$", max_length=64)]
Moment = Annotated[
    str,
    Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\+00:00$"),
    AfterValidator(lambda text: dt.datetime.fromisoformat(text) and text),
]
Signature = Annotated[str, Field(max_length=256)]
InvitationId = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
_PUBLIC_LINE = r"^ecdsa-sha2-nistp384 [A-Za-z0-9+/=]{100,300}$"
PublicLine = Annotated[str, Field(pattern=_PUBLIC_LINE)]
_Document = TypeVar("_Document", bound="_Signed")


def now() -> dt.datetime:
    """The time, in UTC, to the second."""
    return dt.datetime.now(dt.UTC).replace(microsecond=0)


# ---- keys and fingerprints -------------------------------------------------------------------------------------------


def fingerprint(public_key: bytes) -> str:
    """Six words and six digits for a public key, to be read over the phone.

    Parameters
    ----------
    public_key : bytes
        PEM (of several blocks the first), or an OpenSSH line. The spelling does not matter: the key counts.
    """
    digest = hashlib.sha256(b"fednnunet fingerprint 1\n" + _der(public_key)).digest()
    words = " ".join(WORDS[byte] for byte in digest[:6])
    number = int.from_bytes(digest[6:14], "big") % 1_000_000
    return f"{words} {number // 1000:03d} {number % 1000:03d}"


def same_fingerprint(first: str, second: str) -> bool:
    """Whether two people read the same words and digits, however they spaced and wrote them."""

    def plain(text: str) -> bytes:
        return "".join(character for character in text.lower() if character.isascii() and character.isalnum()).encode()

    return hmac.compare_digest(plain(first), plain(second))


def _der(public_key: bytes) -> bytes:
    try:
        blocks = keypairs.pem_blocks(public_key)
        key: Any = (
            serialization.load_pem_public_key(blocks[0])
            if blocks
            else serialization.load_ssh_public_key(public_key.strip())
        )
    except keypairs.UNREADABLE as error:
        raise FednnunetError(Code.REQUEST_INVALID, "no public key of a kind that is used here") from error
    der: bytes = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return der


def public_line(public_key: bytes) -> str:
    """`ecdsa-sha2-nistp384 BASE64` of a site's public key, without its comment; raises FNU-118 for any other key."""
    try:
        key = serialization.load_ssh_public_key(public_key.strip())
    except keypairs.UNREADABLE as error:
        raise FednnunetError(Code.REQUEST_INVALID, "not a public key in OpenSSH's format") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise FednnunetError(Code.REQUEST_INVALID, "a site's key is NIST P-384; this is another kind")
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def _site_key(line: str) -> ec.EllipticCurvePublicKey:
    key = serialization.load_ssh_public_key(public_line(line.encode()).encode())
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key


def coordinator_keys(pem: str) -> list[ed25519.Ed25519PublicKey]:
    """The Ed25519 keys of a coordinator's PEM text, one or two; raises FNU-114."""
    found = []
    for block in keypairs.pem_blocks(pem.encode(errors="replace")):
        try:
            key = serialization.load_pem_public_key(block)
        except keypairs.UNREADABLE as error:
            raise FednnunetError(Code.INVITATION_INVALID, "the coordinator's key cannot be read") from error
        if not isinstance(key, ed25519.Ed25519PublicKey):
            raise FednnunetError(Code.INVITATION_INVALID, "the coordinator's key is not Ed25519")
        found.append(key)
    if not 1 <= len(found) <= 2:
        raise FednnunetError(Code.INVITATION_INVALID, f"{len(found)} keys of the coordinator, not one or two")
    return found


def _holds(key: PublicKey, signature: str, data: bytes) -> bool:
    try:
        return keypairs.holds(key, base64.b64decode(signature, validate=True), data)
    except ValueError:  # binascii's is one
        return False


def _signed_by(key: PrivateKey, data: bytes) -> str:
    return base64.b64encode(keypairs.sign(key, data)).decode()


# ---- documents -------------------------------------------------------------------------------------------------------


class _Signed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def data(self) -> bytes:
        """The bytes that a signature is over: all but the signatures."""
        return canonical_json(self.model_dump(exclude={"signature", "earlier_signature"}))

    def file(self) -> bytes:
        """What stands in the file."""
        return canonical_json(self.model_dump()) + b"\n"

    @classmethod
    def _parse(cls: type[_Document], data: bytes, code: Code) -> _Document:
        if len(data) > MAX_BYTES:
            raise FednnunetError(code, f"{len(data)} bytes, at most {MAX_BYTES}")
        try:
            document = cls.model_validate(json.loads(data), strict=True)
            spelt = document.file()
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:3])
            raise FednnunetError(code, faults) from error
        except (ValueError, RecursionError) as error:
            raise FednnunetError(code, "not JSON") from error
        if data.strip() != spelt.strip():
            raise FednnunetError(code, "not spelt the way this version writes it: it was changed on its way")
        return document


class Invitation(_Signed):
    """What a hospital needs to enroll, once."""

    format: Literal["fednnunet invitation 1"] = "fednnunet invitation 1"
    id: InvitationId
    site: SiteName
    orchestrator: Annotated[str, Field(pattern=ENDPOINT, max_length=300)]
    ca: Annotated[str, Field(max_length=4096)]
    coordinator: Annotated[str, Field(max_length=1024)]
    not_before: Moment
    not_after: Moment
    token: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{43}$")]
    signature: Signature = ""

    @classmethod
    def make(
        cls,
        site: str,
        orchestrator: str,
        ca: str,
        coordinator: str,
        key: ed25519.Ed25519PrivateKey,
        days: float = 7,
        start: dt.datetime | None = None,
    ) -> Self:
        """A new invitation for `site`, signed by the coordinator's `key`; raises FNU-114 where a value cannot stand."""
        begin = start or now()
        try:
            unsigned = cls(
                id=secrets.token_hex(8),
                site=site,
                orchestrator=orchestrator,
                ca=ca,
                coordinator=coordinator,
                not_before=(begin - SKEW).isoformat(),
                not_after=(begin + dt.timedelta(days=days)).replace(microsecond=0).isoformat(),
                token=secrets.token_urlsafe(32),
            )
        except ValidationError as error:
            faults = "; ".join(f"{fault['loc'][0]}: {fault['msg']}" for fault in error.errors())
            raise FednnunetError(Code.SETTINGS_INVALID, faults) from error
        return unsigned.model_copy(update={"signature": _signed_by(key, unsigned.data())})

    @classmethod
    def read(cls, data: bytes) -> Self:
        """Check an invitation's shape, keys and signature, not its dates; raises FNU-114."""
        invitation = cls._parse(data, Code.INVITATION_INVALID)
        try:
            x509.load_pem_x509_certificate(invitation.ca.encode())
        except ValueError as error:
            raise FednnunetError(Code.INVITATION_INVALID, "its CA certificate cannot be read") from error
        if not _holds(coordinator_keys(invitation.coordinator)[0], invitation.signature, invitation.data()):
            raise FednnunetError(Code.INVITATION_INVALID, "its signature does not hold: it was changed on its way")
        return invitation

    def check_dates(self, at: dt.datetime | None = None) -> None:
        """Raise FNU-115 before its first and after its last moment."""
        check_dates(self.not_before, self.not_after, at)

    @property
    def token_sha256(self) -> str:
        """What the orchestrator keeps of the token."""
        return hashlib.sha256(self.token.encode()).hexdigest()


def check_dates(not_before: str, not_after: str, at: dt.datetime | None = None) -> None:
    """Raise FNU-115 before an invitation's first and after its last moment."""
    moment = at or now()
    if moment < dt.datetime.fromisoformat(not_before):
        raise FednnunetError(Code.INVITATION_EXPIRED, f"valid from {not_before}; this clock says {moment.isoformat()}")
    if moment > dt.datetime.fromisoformat(not_after):
        raise FednnunetError(Code.INVITATION_EXPIRED, f"valid until {not_after}; this clock says {moment.isoformat()}")


class Request(_Signed):
    """What a hospital sends back: its public key, and why it may."""

    format: Literal["fednnunet request 1"] = "fednnunet request 1"
    site: SiteName
    public_key: PublicLine
    made_at: Moment
    invitation: InvitationId | None = None
    proof: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    renews: PublicLine | None = None
    earlier_signature: Signature | None = None
    signature: Signature = ""

    @classmethod
    def make(cls, invitation: Invitation, key: ec.EllipticCurvePrivateKey) -> Self:
        """A request to be let in, by an invitation."""
        line = _line_of(key)
        unsigned = cls(
            site=invitation.site,
            public_key=line,
            made_at=now().isoformat(),
            invitation=invitation.id,
            proof=proof(invitation.token_sha256, invitation.id, invitation.site, line),
        )
        return unsigned.model_copy(update={"signature": _signed_by(key, unsigned.data())})

    @classmethod
    def renewal(cls, site: str, earlier: ec.EllipticCurvePrivateKey, key: ec.EllipticCurvePrivateKey) -> Self:
        """A request to put `key` in the place of `earlier`."""
        unsigned = cls(site=site, public_key=_line_of(key), made_at=now().isoformat(), renews=_line_of(earlier))
        data = unsigned.data()
        return unsigned.model_copy(
            update={"earlier_signature": _signed_by(earlier, data), "signature": _signed_by(key, data)}
        )

    @classmethod
    def read(cls, data: bytes) -> Self:
        """Check a request's shape and its signatures, not its right to be let in; raises FNU-118."""
        request = cls._parse(data, Code.REQUEST_INVALID)
        if (request.invitation is None) != (request.proof is None) or (request.invitation is None) == (
            request.renews is None
        ):
            raise FednnunetError(Code.REQUEST_INVALID, "neither by an invitation nor a renewal")
        if (request.renews is None) != (request.earlier_signature is None) or request.renews == request.public_key:
            raise FednnunetError(Code.REQUEST_INVALID, "not a renewal: it needs two keys and two signatures")
        for line in filter(None, (request.public_key, request.renews)):
            if public_line(line.encode()) != line:
                raise FednnunetError(Code.REQUEST_INVALID, "a key that is not spelt the one way")
        if not _holds(_site_key(request.public_key), request.signature, request.data()):
            raise FednnunetError(Code.REQUEST_INVALID, "its signature is not by its key: it was changed on its way")
        if request.renews is not None and not _holds(
            _site_key(request.renews), request.earlier_signature or "", request.data()
        ):
            raise FednnunetError(Code.REQUEST_INVALID, "it is not signed by the key that it renews")
        return request

    @property
    def fingerprint(self) -> str:
        """Words and digits of its key."""
        return fingerprint(self.public_key.encode())


def _line_of(key: ec.EllipticCurvePrivateKey) -> str:
    raw = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return public_line(raw)


def proof(token_sha256: str, invitation: str, site: str, line: str) -> str:
    """HMAC-SHA256, keyed by the token's SHA-256, over invitation, site and public key, in hex."""
    text = "\n".join(("fednnunet enrollment 1", invitation, site, line))
    return hmac.new(bytes.fromhex(token_sha256), text.encode(), hashlib.sha256).hexdigest()


class Statement(_Signed):
    """The coordinator's next key, vouched for by the key before."""

    format: Literal["fednnunet coordinator key 1"] = "fednnunet coordinator key 1"
    coordinator: Annotated[str, Field(max_length=512)]
    replaces: Annotated[str, Field(max_length=512)]
    made_at: Moment
    earlier_signature: Signature = ""
    signature: Signature = ""

    @classmethod
    def make(cls, earlier: ed25519.Ed25519PrivateKey, key: ed25519.Ed25519PrivateKey) -> Self:
        """State that `key` follows `earlier`."""
        unsigned = cls(coordinator=pem(key), replaces=pem(earlier), made_at=now().isoformat())
        data = unsigned.data()
        return unsigned.model_copy(
            update={"earlier_signature": _signed_by(earlier, data), "signature": _signed_by(key, data)}
        )

    @classmethod
    def read(cls, data: bytes, trusted: str) -> Self:
        """Check a statement against the keys that a site trusts; raises FNU-114.

        Parameters
        ----------
        data : bytes
            The file.
        trusted : str
            PEM: the site's coordinator.pub.
        """
        statement = cls._parse(data, Code.INVITATION_INVALID)
        follows, replaces = coordinator_keys(statement.coordinator)[0], coordinator_keys(statement.replaces)[0]
        if not _holds(follows, statement.signature, statement.data()) or not _holds(
            replaces, statement.earlier_signature, statement.data()
        ):
            raise FednnunetError(Code.INVITATION_INVALID, "its signatures do not hold: it was changed on its way")
        if all(replaces.public_bytes_raw() != key.public_bytes_raw() for key in coordinator_keys(trusted)):
            raise FednnunetError(
                Code.INVITATION_INVALID,
                "it is signed by a key that this site does not trust",
                "Call the coordinator; if the key was lost, the site needs a new invitation.",
            )
        return statement


def pem(key: ed25519.Ed25519PrivateKey) -> str:
    """The public half of an Ed25519 key, SubjectPublicKeyInfo PEM."""
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


def read_capped(path: Path, code: Code) -> bytes:
    """The bytes of a small file that came from elsewhere; raises `code` when it is absent or larger than 16 KiB."""
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise FednnunetError(code, f"{path}: {error.strerror}", "Check the path of the file.") from error
    if len(data) > MAX_BYTES:
        raise FednnunetError(code, f"{path}: more than {MAX_BYTES} bytes")
    return data
