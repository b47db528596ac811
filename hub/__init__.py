"""The weights of others: downloads, formats, adaptation, export."""
