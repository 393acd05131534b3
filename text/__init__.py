"""From text to token files: reading, cleaning, the tokenizer, the starter corpus, train.bin and its
windows.
"""
