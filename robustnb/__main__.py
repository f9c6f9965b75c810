"`python -m robustnb` is the command `robustnb`."
import sys
from robustnb.commands.main import main

if __name__ == '__main__': sys.exit(main())
