"""python -m lorafit: the command line. Owns nothing."""

from lorafit.cli import main

if __name__ == "__main__":
    main()
