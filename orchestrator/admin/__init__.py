"""`fednnunet`: the command line of the person who coordinates a federation."""
