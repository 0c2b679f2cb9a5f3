"""A site's key, and what Flower's supernode signs with it."""

from __future__ import annotations

import datetime as dt
from base64 import b64encode

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message


class Site:
    """A key of its own."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.public = public_key_to_bytes(self._key.public_key())

    def headers(self, age: float = 0.0) -> dict[str, str]:
        """What a request's head says, `age` seconds after it was signed."""
        moment = (dt.datetime.now(dt.UTC) - dt.timedelta(seconds=age)).isoformat()
        return {
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(self.public).decode(),
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(self._key, moment.encode())).decode(),
            TIMESTAMP_HEADER: moment,
        }
