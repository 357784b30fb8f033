"""Who calls: bearer keys, and what is derived from them.

Knows keys and metadata; which rpc needs a key is the server's. A tenant is a keyed hash of a key,
and that is what everything behind this file sees.
"""

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...engine.errors import AuthenticationError
from ..keys import bearer_key

Metadata = Iterable[tuple[str, str | bytes]]

_HEADER = "authorization"
_TENANT_BYTES = 16


@dataclass(frozen=True)
class Caller:
    """tenant: of one key; empty where the server has none."""

    tenant: bytes


class Callers:
    """Tells callers by their keys. Without keys all are the same one."""

    def __init__(self, keys: Sequence[str], secret: bytes) -> None:
        """secret: of this engine; without it nobody can tell a tenant from a key."""
        self._secret = secret
        self._tenants = [self._hash(key) for key in keys]

    def of_key(self, key: str) -> Caller:
        """Raises AuthenticationError."""
        if not self._tenants:
            return Caller(b"")
        tenant = self._hash(key)
        if not self._is_one_of_ours(tenant):
            raise AuthenticationError(
                "the key is missing or wrong; send the metadata `authorization: Bearer KEY` with "
                "one of the server's keys"
            )
        return Caller(tenant)

    def is_known(self, key: str) -> bool:
        """Whether of_key() would take it."""
        return not self._tenants or self._is_one_of_ours(self._hash(key))

    def of_metadata(self, metadata: Metadata | None) -> Caller:
        """The caller of an rpc. Raises AuthenticationError."""
        values = [value for name, value in metadata or () if name.lower() == _HEADER]
        # Two headers could mean one key to a proxy and the other to us.
        value = values[0] if len(values) == 1 else ""
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        return self.of_key(bearer_key(value))

    def salt_of(self, caller: Caller, cache_salt: str) -> bytes:
        """What separates cached prefixes: of this tenant, and of what it asked for."""
        if not caller.tenant and not cache_salt:
            return b""
        text = caller.tenant.ljust(_TENANT_BYTES, b"\0") + cache_salt.encode()
        return hashlib.blake2b(
            text, key=self._secret, digest_size=_TENANT_BYTES, person=b"quire salt"
        ).digest()

    def _is_one_of_ours(self, tenant: bytes) -> bool:
        # All of them, without stopping at a match: which one it was is not to be measured.
        matches = [hmac.compare_digest(tenant, ours) for ours in self._tenants]
        return any(matches)

    def _hash(self, key: str) -> bytes:
        data = key.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(
            data, key=self._secret, digest_size=_TENANT_BYTES, person=b"quire tenant"
        ).digest()
