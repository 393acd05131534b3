"""What every command and every room uses: the console, files, flags, the machine. It knows nothing
of the rest.
"""
