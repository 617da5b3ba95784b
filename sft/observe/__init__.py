"""What people look at: documents in colours, histograms, charts. Takes numbers and text, returns something to print or a file.

Nothing here decides or changes anything.
"""
