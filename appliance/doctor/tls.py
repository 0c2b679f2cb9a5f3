"""Whether it is the orchestrator that answers: chain, name and dates of its certificate; and who inspects TLS.

When the chain does not verify, the certificate that was shown is fetched once more without a check, to say who signed
it. Nothing but the handshake is sent on that connection.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import ssl

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding

from appliance.doctor import network
from appliance.doctor.context import Context
from appliance.doctor.finding import Finding, Private, fail, ok, skipped, warn
from federation.errors import Code, FednnunetError

DAYS_AHEAD = 30
_NOT_YET, _EXPIRED, _NAME, _ADDRESS = 9, 10, 62, 64  # X509_V_ERR_* of OpenSSL


def check(context: Context) -> list[Finding]:
    """Shake hands as Flower's client does; explain what does not hold."""
    try:
        authorities, how = network.authorities(context.settings), network.trust(context.settings)
    except FednnunetError as error:
        where = {"where": Private("", f" ({error.found})")}
        return [
            fail(
                Code.CA_CERTIFICATE_UNUSABLE,
                "ca_certificate is missing or holds no certificate[where]",
                "Put the ca.crt of the coordinator's invitation there (`appliance enroll`).",
                private=where,
            )
        ]
    try:
        with network.secure(context, how) as connection:
            shown = x509.load_der_x509_certificate(connection.getpeercert(True) or b"")
            version = connection.version()
    except ssl.SSLCertVerificationError as error:
        return _explain(context, error, authorities)
    except network.NotTested as reason:
        return [skipped(str(reason))]
    except (OSError, UnicodeError) as error:
        return [_no_handshake(context, error)]
    left = (shown.not_valid_after_utc - _now()).days
    private = {**network.private_place(context.settings), **_names(shown, authorities)}
    pin = hashlib.sha256(authorities[0].public_bytes(Encoding.DER)).hexdigest()
    findings = [
        ok(
            f"[orchestrator] shows a certificate that holds for {left} more days, signed by the authority of "
            f"ca_certificate ({version}, CA's SHA-256 {pin[:16]})",
            private=private,
            measured={"days_left": left, "tls": version, "ca_sha256": pin},
        )
    ]
    if len(authorities) > 1:
        findings.append(
            warn(
                f"ca_certificate holds {len(authorities)} certificates; the one shown was signed by [issuer]",
                "If one of them is of a proxy that inspects TLS, that proxy reads the weights (it cannot change a task "
                "or a result, which are signed): the coordinator should know.",
                private={"issuer": Private("one of them", private["issuer"].value)},
            )
        )
    if left < DAYS_AHEAD:
        findings.append(
            warn(
                f"the orchestrator's certificate ends in {left} days",
                "Tell the coordinator to rotate it.",
                measured={"days_left": left},
            )
        )
    for authority in authorities:
        left = (authority.not_valid_after_utc - _now()).days
        if left < DAYS_AHEAD:
            findings.append(
                warn(f"a certificate in ca_certificate ends in {left} days", "Ask the coordinator for a new ca.crt.")
            )
    return findings


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _no_handshake(context: Context, error: Exception) -> Finding:
    private = {**network.private_place(context.settings), "error": Private(type(error).__name__, str(error))}
    if isinstance(error, network.ProxyRefused):
        return fail(Code.PROXY_REFUSED, "the proxy does not open the way", "See the check proxy.", private=private)
    if isinstance(error, TimeoutError):
        return fail(
            Code.TLS_FAILED,
            f"[orchestrator] takes the connection and then says nothing for {context.timeout:g} s",
            "Something between holds the connection open (a firewall, a load balancer without a server behind it), "
            "or the orchestrator hangs: ask the coordinator, then IT.",
            private=private,
        )
    return fail(
        Code.TLS_FAILED,
        "[orchestrator] takes the connection, but no TLS comes about ([error])",
        "Check that the port is that of the hospitals' listener; a firewall may also cut TLS that it cannot read.",
        private=private,
    )


def _names(shown: x509.Certificate, authorities: list[x509.Certificate]) -> dict[str, Private]:
    return {
        "issuer": Private("another authority", shown.issuer.rfc4514_string() or "an issuer without a name"),
        "subject": Private("its name", shown.subject.rfc4514_string()),
        "authority": Private("that of ca_certificate", authorities[0].subject.rfc4514_string()),
        "names": Private("other names", ", ".join(_alternative_names(shown)) or "no name"),
    }


def _alternative_names(shown: x509.Certificate) -> list[str]:
    try:
        extension = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    names: list[str] = list(extension.get_values_for_type(x509.DNSName))
    return names + [str(address) for address in extension.get_values_for_type(x509.IPAddress)]


def _signed_by(shown: x509.Certificate, authorities: list[x509.Certificate]) -> bool:
    for authority in authorities:
        try:
            shown.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return True
    return False


def _explain(
    context: Context, error: ssl.SSLCertVerificationError, authorities: list[x509.Certificate]
) -> list[Finding]:
    """Each thing that does not hold, once."""
    try:
        shown = network.shown_certificate(context)
    except (OSError, ValueError) as second:
        return [_no_handshake(context, second)]
    private = {**network.private_place(context.settings), **_names(shown, authorities)}
    ours = _signed_by(shown, authorities)
    known = (_NOT_YET, _EXPIRED, _NAME, _ADDRESS)
    if not ours and error.verify_code not in known:
        return [_foreign(shown, authorities, private)]
    findings = []
    if error.verify_code in (_NAME, _ADDRESS):
        findings.append(
            fail(
                Code.CERTIFICATE_NAME,
                "the certificate is for [names], not for the host of [orchestrator]",
                "Dial the orchestrator by a name of its certificate, or ask the coordinator to add this one.",
                private=private,
            )
        )
    for what, certificate in (
        ("the orchestrator's certificate", shown),
        *(("a certificate in ca_certificate", one) for one in authorities),
    ):
        findings += _dates(what, certificate)
    if not findings:
        private["error"] = Private(f"OpenSSL's error {error.verify_code}", error.verify_message)
        findings.append(
            fail(Code.CERTIFICATE_UNTRUSTED, "the certificate's chain does not hold: [error]", private=private)
        )
    return findings


def _foreign(shown: x509.Certificate, authorities: list[x509.Certificate], private: dict[str, Private]) -> Finding:
    if shown.issuer in [authority.subject for authority in authorities]:
        return fail(
            Code.CERTIFICATE_UNTRUSTED,
            "the certificate was signed by an authority with the name of the federation's CA, but with another key",
            "The federation's CA was made anew, or somebody uses its name: ask the coordinator on the phone, and "
            "take ca.crt from a new invitation.",
            private=private,
        )
    who = "itself ([issuer])" if shown.issuer == shown.subject else "[issuer]"
    return fail(
        Code.CERTIFICATE_UNTRUSTED,
        f"the certificate was signed by {who}, not by the federation's CA ([authority]): a proxy inspects TLS, or "
        "something else answers at this address",
        "Ask IT to let [orchestrator] pass without inspection. If nothing inspects TLS here, the address or ca.crt is "
        "of another federation: ask the coordinator.",
        private=private,
    )


def _dates(what: str, certificate: x509.Certificate) -> list[Finding]:
    since, until, now = certificate.not_valid_before_utc, certificate.not_valid_after_utc, _now()
    if since <= now <= until:
        return []
    found = (
        f"{what} is not valid before {since:%Y-%m-%d %H:%M} UTC"
        if now < since
        else f"{what} ended on {until:%Y-%m-%d %H:%M} UTC"
    )
    return [
        fail(
            Code.CERTIFICATE_DATES,
            f"{found}; this machine's clock says {now:%Y-%m-%d %H:%M} UTC",
            "If that clock is wrong (see the check clock), set it. Else ask the coordinator to rotate the certificate.",
        )
    ]
