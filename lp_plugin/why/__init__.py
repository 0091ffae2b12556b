"""Why a plan is as it is, and what would fit where none does; every sentence rests on solving again."""
