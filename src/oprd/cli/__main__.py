"""`python -m oprd.cli …`, for `accelerate launch -m oprd.cli train …`."""

from oprd.cli import main

if __name__ == "__main__":
    main()
