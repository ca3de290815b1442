"""Transactions on goldens: create, restore, verify, export, import, remove."""
