"""Does what is cheap hold on all of CIFAR-100, and on text?"""
