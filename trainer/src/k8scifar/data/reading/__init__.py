"""Sources of images: folders, archives, addresses and CIFAR-10's own files, as arrays."""
