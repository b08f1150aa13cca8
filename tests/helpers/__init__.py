"What several tests share: toy runs, small presets, stores of noise, small models. `from helpers.models import ...`"
