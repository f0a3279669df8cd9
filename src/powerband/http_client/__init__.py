"""An HTTP/1.1 client: connections that stream responses, and single requests for control traffic."""
