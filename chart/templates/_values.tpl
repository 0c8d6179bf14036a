{{- /* Included first in each template: complete and check .Values in place, once. A null, or a key that an older chart's
     values lack, becomes the default; numbers that came as text become numbers. files/rules.json has what it needs. */ -}}
{{- define "k8scifar.values" -}}
{{- if not (hasKey .Values "_whole") -}}
{{- $rules := .Files.Get "files/rules.json" | fromJson -}}
{{- include "k8scifar.fill" (dict "values" .Values "defaults" $rules.defaults "maps" $rules.maps "path" "") -}}
{{- range $resources := list .Values.resources .Values.initResources .Values.tensorboard.resources -}}
{{- include "k8scifar.quantities" $resources -}}
{{- end -}}
{{- range $path, $limits := $rules.numbers -}}
{{- include "k8scifar.at" (dict "holder" $.Values "key" "train" "path" "train" "rest" (splitList "." $path) "check" "k8scifar.number" "rule" $limits) -}}
{{- end -}}
{{- range $path, $type := $rules.texts -}}
{{- $keys := splitList "." $path -}}
{{- include "k8scifar.at" (dict "holder" $.Values "key" (first $keys) "path" (first $keys) "rest" (rest $keys) "check" "k8scifar.text" "rule" (index $rules.types $type)) -}}
{{- end -}}
{{- include "k8scifar.validate" . -}}
{{- include "k8scifar.validateExtras" . -}}
{{- $_ := set .Values "_whole" true -}}
{{- end -}}
{{- end -}}

{{- /* Set each default whose key is missing or null; in the user's own maps (`maps`) null takes a key away. */ -}}
{{- define "k8scifar.fill" -}}
{{- range $key, $default := .defaults -}}
{{- $path := printf "%s%s" $.path $key -}}
{{- $value := index $.values $key -}}
{{- if kindIs "invalid" $value -}}
{{- $_ := set $.values $key $default -}}
{{- else if and (kindIs "map" $default) (kindIs "map" $value) (not (hasKey $.maps $path)) -}}
{{- include "k8scifar.fill" (dict "values" $value "defaults" $default "maps" $.maps "path" (printf "%s." $path)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Write each amount of a resource as text: `--set` gives 0.5 as text, a file as a number. */ -}}
{{- define "k8scifar.quantities" -}}
{{- range $side := list "limits" "requests" -}}
{{- $amounts := index $ $side -}}
{{- range $name, $amount := $amounts -}}
{{- if not (kindIs "string" $amount) -}}
{{- $whole := int64 $amount -}}
{{- $_ := set $amounts $name (ternary (toString $whole) (toString $amount) (eq (float64 $whole) (float64 $amount))) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Include the template `check` for each value that a path leads to: of (holder, key, path, rest, check, rule). The
     value is the holder's at the key; `rest` are the further steps: a key, [] for the items of a list, {} for the
     values of a map, {key} for its keys. */ -}}
{{- define "k8scifar.at" -}}
{{- $node := index .holder .key -}}
{{- if kindIs "invalid" $node -}}
{{- else if not .rest -}}
{{- include .check (dict "holder" .holder "key" .key "value" $node "path" .path "rule" .rule) -}}
{{- else -}}
{{- $step := first .rest -}}
{{- $next := dict "rest" (rest .rest) "check" .check "rule" .rule -}}
{{- if eq $step "[]" -}}
{{- range $index, $_ := $node -}}
{{- include "k8scifar.at" (merge (dict "holder" $node "key" $index "path" (printf "%s[%d]" $.path $index)) $next) -}}
{{- end -}}
{{- else if eq $step "{}" -}}
{{- range $key, $_ := $node -}}
{{- include "k8scifar.at" (merge (dict "holder" $node "key" $key "path" (printf "%s.%s" $.path $key)) $next) -}}
{{- end -}}
{{- else if eq $step "{key}" -}}
{{- range $key, $_ := $node -}}
{{- include "k8scifar.at" (merge (dict "holder" (dict "key" $key) "key" "key" "path" (printf "%s: the key" $.path)) $next) -}}
{{- end -}}
{{- else -}}
{{- include "k8scifar.at" (merge (dict "holder" $node "key" $step "path" (printf "%s.%s" .path $step)) $next) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Replace a number that came as text, as `--set a=0.1` gives it, by the number, and refuse one beyond the limits. */ -}}
{{- define "k8scifar.number" -}}
{{- if kindIs "string" .value -}}
{{- $number := float64 .value -}}
{{- range $limit, $words := dict "minimum" "at least" "maximum" "at most" "exclusiveMinimum" "more than" "exclusiveMaximum" "less than" -}}
{{- $bound := index $.rule $limit | float64 -}}
{{- $low := or (and (eq $limit "minimum") (lt $number $bound)) (and (eq $limit "exclusiveMinimum") (le $number $bound)) -}}
{{- $high := or (and (eq $limit "maximum") (gt $number $bound)) (and (eq $limit "exclusiveMaximum") (ge $number $bound)) -}}
{{- if and (hasKey $.rule $limit) (or $low $high) -}}
{{- fail (printf "\n\n%s %s must be %s %g\n" $.path $.value $words $bound) -}}
{{- end -}}
{{- end -}}
{{- $_ := set .holder .key $number -}}
{{- end -}}
{{- end -}}

{{- /* Refuse a text that does not match the pattern of its type. */ -}}
{{- define "k8scifar.text" -}}
{{- if and (kindIs "string" .value) (not (regexMatch .rule.pattern .value)) -}}
{{- fail (printf "\n\n%s %q %s\n" .path .value .rule.sentence) -}}
{{- end -}}
{{- end -}}

{{- /* Merge the chart's keys (`own`, YAML) and the user's into one map; refuse a user's key that the chart sets. */ -}}
{{- define "k8scifar.merged" -}}
{{- $merged := .own | fromYaml -}}
{{- range $key, $value := .user -}}
{{- if and (hasKey $merged $key) (ne (index $merged $key) $value) -}}
{{- fail (printf "\n\n%s.%s is a key that the chart sets (to %q): choose another one\n" $.path $key (index $merged $key)) -}}
{{- end -}}
{{- $_ := set $merged $key $value -}}
{{- end -}}
{{- toYaml $merged -}}
{{- end -}}
