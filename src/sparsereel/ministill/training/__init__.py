"""How ministill was trained: run `python -m sparsereel.ministill.train --help`.

Read in this order: recipe.py (what is trained on what, for how long), pictures.py, vae_stage.py, unet_stage.py,
architecture.py. Loop, checkpoints and optimizers are minireel's.
"""
