"""A class in a module that no worker can import."""


class Strength:
    def __init__(self, value):
        self.value = value

    def of(self, change):
        return self.value * change
