"""Ledger: what each rule is worth, in accuracy, operations and bytes of whole runs."""
