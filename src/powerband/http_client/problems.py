"""Why a connection failed, in words: without numbers of errors, and with what to check."""

from __future__ import annotations

import errno
import re
import socket
import ssl

_ERRNO = re.compile(r"\[Errno (\d+)\]")
_TEXTS = {
    errno.ECONNREFUSED: "connection refused: nothing listens on this port",
    errno.ECONNRESET: "the other side closed the connection",
    errno.EPIPE: "the other side closed the connection",
    errno.ECONNABORTED: "the connection was aborted",
    errno.ETIMEDOUT: "the connection timed out: the host is down, or a firewall drops the packets",
    errno.EHOSTUNREACH: "the host cannot be reached: it is down, or in another network",
    errno.ENETUNREACH: "the network cannot be reached: this machine seems to have no connection",
    errno.ENETDOWN: "the network is down",
    errno.EMFILE: "this process may open no more files: raise 'ulimit -n'",
    errno.ENFILE: "this machine may open no more files: raise fs.file-max",
    errno.EADDRNOTAVAIL: "no local port is left for another connection",
    errno.EACCES: "this machine does not permit the connection: check its firewall",
    errno.EPERM: "this machine does not permit the connection: check its firewall",
}
_NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNEXPECTED_MESSAGE", "PACKET_LENGTH_TOO_LONG")


def connection_problem(error: BaseException) -> str:
    """The reason as a phrase that can follow a colon."""
    match error:
        case ssl.SSLCertVerificationError():
            return f"its certificate is not trusted: {error.verify_message}"
        case ssl.SSLError():
            reason: str = getattr(error, "reason", None) or ""  # OpenSSL's name for it
            if reason in _NOT_TLS:
                return "it does not speak TLS on this port: use http:// instead of https://"
            return f"the TLS handshake failed{reason and ': '}{reason.replace('_', ' ').lower()}"
        case socket.gaierror(errno=socket.EAI_AGAIN):
            return "the name of the host cannot be resolved now: no DNS server answers"
        case socket.gaierror():
            return "the name of the host cannot be resolved (DNS): check its spelling"
        case OSError(errno=None):  # asyncio joins the errors of several addresses, and adds words of its own
            found = [int(number) for number in _ERRNO.findall(str(error))]
            known = [_TEXTS[number] for number in found if number in _TEXTS]
            return known[0] if known else _ERRNO.sub("", str(error)).strip() or "no answer in time"
        case OSError():
            return _TEXTS.get(error.errno or 0) or (error.strerror or str(error)).strip().lower()
    return str(error) or type(error).__name__
