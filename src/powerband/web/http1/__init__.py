"""HTTP/1.1 on one connection (RFC 9112): heads, the framing of bodies, exchanges, and limits on all of them."""
