"""`python -m prelora_ray` is the command `prelora`."""

from prelora_ray.cli import main

if __name__ == "__main__":
    main()
