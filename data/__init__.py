"""Makes `data` this folder, whatever packages of that name are installed."""
