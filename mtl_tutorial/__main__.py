"""``python -m mtl_tutorial`` is ``mtl-tutorial``."""

from .cli import main

if __name__ == "__main__":
    main()
