{{- /* First in each template: what a null, or values of an older chart, left out becomes the chart's own default;
     numbers that came as text become numbers; then everything is checked. Done once, in place. */ -}}
{{- define "k8scifar.values" -}}
{{- if not (hasKey .Values "_whole") -}}
{{- $facts := .Files.Get "files/rules.yaml" | fromYaml -}}
{{- include "k8scifar.fill" (dict "values" .Values "defaults" $facts.defaults "free" $facts.free "path" "") -}}
{{- range $path, $limits := $facts.numbers -}}
{{- include "k8scifar.number" (dict "node" $.Values.train "rest" (splitList "." $path) "path" "train" "limits" $limits) -}}
{{- end -}}
{{- range $path, $rule := $facts.rules -}}
{{- include "k8scifar.rule" (dict "node" $.Values "rest" (splitList "." $path) "path" "" "rule" $rule) -}}
{{- end -}}
{{- include "k8scifar.validate" . -}}
{{- include "k8scifar.validateExtras" . -}}
{{- $_ := set .Values "_whole" true -}}
{{- end -}}
{{- end -}}

{{- /* Set each default whose key is not there or null; a map of the user's own keys (`free`) is taken as it is. */ -}}
{{- define "k8scifar.fill" -}}
{{- range $key, $default := .defaults -}}
{{- $path := printf "%s%s" $.path $key -}}
{{- $value := index $.values $key -}}
{{- if kindIs "invalid" $value -}}
{{- $_ := set $.values $key $default -}}
{{- else if and (kindIs "map" $default) (kindIs "map" $value) (not (has $path $.free)) -}}
{{- include "k8scifar.fill" (dict "values" $value "defaults" $default "free" $.free "path" (printf "%s." $path)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* `--set a=0.1` brings text where a file brings a number: make it the number, within the limits of the schema. */ -}}
{{- define "k8scifar.number" -}}
{{- $key := first .rest -}}
{{- if eq $key "[]" -}}
{{- range $index, $item := .node -}}
{{- include "k8scifar.number" (dict "node" $item "rest" (rest $.rest) "path" (printf "%s[%d]" $.path $index) "limits" $.limits) -}}
{{- end -}}
{{- else if kindIs "map" .node -}}
{{- $value := index .node $key -}}
{{- $path := printf "%s.%s" .path $key -}}
{{- if and (gt (len .rest) 1) (not (kindIs "invalid" $value)) -}}
{{- include "k8scifar.number" (dict "node" $value "rest" (rest .rest) "path" $path "limits" .limits) -}}
{{- else if kindIs "string" $value -}}
{{- $number := float64 $value -}}
{{- range $limit, $words := dict "minimum" "at least" "maximum" "at most" "exclusiveMinimum" "more than" "exclusiveMaximum" "less than" -}}
{{- $bound := index $.limits $limit | float64 -}}
{{- $low := or (and (eq $limit "minimum") (lt $number $bound)) (and (eq $limit "exclusiveMinimum") (le $number $bound)) -}}
{{- $high := or (and (eq $limit "maximum") (gt $number $bound)) (and (eq $limit "exclusiveMaximum") (ge $number $bound)) -}}
{{- if and (hasKey $.limits $limit) (or $low $high) -}}
{{- fail (printf "\n\n%s %s must be %s %g\n" $path $value $words $bound) -}}
{{- end -}}
{{- end -}}
{{- $_ := set .node $key $number -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Refuse text that does not fit its rule, naming the value: a path's last letters may be [] for the items of a
     list, {} for the values of a map and {key} for its keys. */ -}}
{{- define "k8scifar.rule" -}}
{{- if kindIs "invalid" .node -}}
{{- else if not .rest -}}
{{- if and (kindIs "string" .node) (not (regexMatch .rule.pattern .node)) -}}
{{- fail (printf "\n\n%s %q %s\n" .path .node .rule.words) -}}
{{- end -}}
{{- else if eq (first .rest) "[]" -}}
{{- range $index, $item := .node -}}
{{- include "k8scifar.rule" (dict "node" $item "rest" (rest $.rest) "path" (printf "%s[%d]" $.path $index) "rule" $.rule) -}}
{{- end -}}
{{- else if eq (first .rest) "{}" -}}
{{- range $key, $item := .node -}}
{{- include "k8scifar.rule" (dict "node" $item "rest" (rest $.rest) "path" (printf "%s.%s" $.path $key) "rule" $.rule) -}}
{{- end -}}
{{- else if eq (first .rest) "{key}" -}}
{{- range $key, $item := .node -}}
{{- include "k8scifar.rule" (dict "node" $key "rest" list "path" (printf "%s: the key" $.path) "rule" $.rule) -}}
{{- end -}}
{{- else -}}
{{- $path := printf "%s.%s" .path (first .rest) | trimPrefix "." -}}
{{- include "k8scifar.rule" (dict "node" (index .node (first .rest)) "rest" (rest .rest) "path" $path "rule" .rule) -}}
{{- end -}}
{{- end -}}

{{- /* One map of the chart's own keys and the user's, as YAML: of (own, user, path). No key twice, none replaced. */ -}}
{{- define "k8scifar.merged" -}}
{{- $merged := .own | fromYaml -}}
{{- range $key, $value := .user -}}
{{- if and (hasKey $merged $key) (ne (index $merged $key) $value) -}}
{{- fail (printf "\n\n%s.%s is a key that the chart sets itself (to %q): choose another one\n" $.path $key (index $merged $key)) -}}
{{- end -}}
{{- $_ := set $merged $key $value -}}
{{- end -}}
{{- toYaml $merged -}}
{{- end -}}
