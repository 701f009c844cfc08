"""HTTP: routes, bodies, disconnects, errors in the dialect's shape."""
