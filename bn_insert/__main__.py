"""`python -m bn_insert`, for launchers such as torchrun."""

from bn_insert_cli.main import main

main()
