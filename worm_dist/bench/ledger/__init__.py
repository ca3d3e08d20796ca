"""Ledger: accuracy, FLOPs and traffic of whole runs under every rule."""
