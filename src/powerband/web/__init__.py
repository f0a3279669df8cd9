"""What every HTTP server of ours shares: bounded connections, request ids, typed bodies, error objects, streams."""
