"""Server contexts that take whatever client certificate is shown, and leave it to the application to judge it.

Python's ssl module has Go's RequestClientCert nowhere: a context that asks for certificates also verifies them, and breaks the handshake of a
client whose certificate it does not like, who then learns nothing. OpenSSL itself has it, as a callback of the context in place of the verification; it
is set through the very library that the ssl module uses. The handshake still proves that the client has the certificate's key.

Source: crypto/tls ClientAuthType; SSL_CTX_set_cert_verify_callback(3).
"""

from __future__ import annotations

import _ssl
import ctypes
import ssl
import sys

from knarr.aiokits.log import get_logger

log = get_logger(__name__)

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


_accept = _Callback(lambda _store_context, _argument: 1)


class _ContextHead(ctypes.Structure):
    """The beginning of CPython's _ssl._SSLContext: the object's head, then OpenSSL's context."""

    _fields_ = [("head", ctypes.c_byte * object.__basicsize__), ("context", ctypes.c_void_p)]


def ask_only(context: ssl.SSLContext) -> bool:
    """Make a server context ask for a certificate without verifying it: Request.presented_certificates() must be judged by the application.

    Returns:
      False where this interpreter's OpenSSL is out of reach; the context is as it was.
    """
    if sys.implementation.name != "cpython":
        return False
    try:
        # A module built into the interpreter has no file: then its OpenSSL is among the process's own symbols.
        library = ctypes.CDLL(getattr(_ssl, "__file__", None))
        replace = library.SSL_CTX_set_cert_verify_callback
    except (OSError, AttributeError) as error:
        log.warning("client certificates of unknown authorities break the handshake", error=str(error))
        return False
    replace.argtypes = [ctypes.c_void_p, _Callback, ctypes.c_void_p]
    replace.restype = None
    replace(_ContextHead.from_address(id(context)).context, _accept, None)
    context.verify_mode = ssl.CERT_OPTIONAL
    return True


def presented(tls: ssl.SSLObject) -> tuple[bytes, ...]:
    """Return the certificates that a client showed, in DER form, its own first; of a resumed session only its own."""
    own = tls.getpeercert(True)
    if own is None:
        return ()
    if sys.version_info >= (3, 13):
        return tuple(tls.get_unverified_chain()) or (own,)
    chain = tls._sslobj.get_unverified_chain() or ()  # type: ignore[attr-defined]
    return tuple(one.public_bytes(_ssl.ENCODING_DER) for one in chain) or (own,)
