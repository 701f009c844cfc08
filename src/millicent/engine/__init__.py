"""The engine: one process per device. Knows no money, and tenants only as opaque numbers."""
