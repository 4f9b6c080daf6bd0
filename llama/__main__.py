"""python -m llama, and torchrun … -m llama."""

from llama.cli.commands import main

if __name__ == "__main__":
    main()
