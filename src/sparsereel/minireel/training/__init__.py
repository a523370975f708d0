"""How minireel was trained: run `python -m sparsereel.minireel.train --help`.

Read in this order: recipe.py (what is trained on what, for how long), clip_sets.py (rendered clips and their latents),
vae_stage.py, transformer_stage.py, flow_matching.py; for the causal
model layouts.py, causal_flow.py, causal_stage.py; optim.py and checkpoint.py are the tools they share.
"""
