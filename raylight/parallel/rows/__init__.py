"""Images and videos split by rows over ranks: the layout of a tensor's rows, and the operations that follow it."""
