"""`python -m tinygpt2`, for torchrun and accelerate launch."""

from tinygpt2.cli.app import main

if __name__ == "__main__":
    main()
