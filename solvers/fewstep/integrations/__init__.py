"""Integrations with other libraries, imported only when used."""
