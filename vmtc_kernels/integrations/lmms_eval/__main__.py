"""See `table.main`."""

from .table import main

main()
