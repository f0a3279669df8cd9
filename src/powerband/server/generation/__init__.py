"""From the body of a completion request to engine requests, and from their outputs to the response."""
