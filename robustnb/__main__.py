"`python -m robustnb` is the command `robustnb`."
import sys
from robustnb.commands.command_line import main

if __name__ == '__main__': sys.exit(main())
