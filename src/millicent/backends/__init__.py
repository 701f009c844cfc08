"""Where requests run: our own engine, other servers, and a fake for tests. Each is a `core.protocols.Backend`."""
